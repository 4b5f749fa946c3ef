"""Calls of one LLM from any number of threads. Their requests share the engine's steps.

A call holds the engine for one step at a time. Between two steps another call gets its turn, so a
stream whose caller does not read it blocks no other call; its requests run in the others' steps.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tpllm.engine.coordinator import Coordinator
from tpllm.errors import NoNextTokenError, WorkerError
from tpllm.offline.fair_lock import FairLock
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.supervision.interrupts import Interrupts
from tpllm.text.output_processor import OutputProcessor, Request


class Call:
    """The requests of one call.

    Attributes:
        changed: requests with new output, possibly repeated
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.changed: deque[Request] = deque()

    def take(self) -> list[RequestOutput]:
        """Return new outputs. The caller must hold the turn, so that no step changes them."""
        outputs = []
        while self.changed:
            request = self.changed.popleft()
            if request.has_new_output:
                outputs.append(request.take())
        return outputs

    @property
    def errors(self) -> dict[str, NoNextTokenError]:
        """The errors that ended requests early, by request id."""
        return {each.request_id: each.error for each in self.requests if each.error is not None}

    def raise_first_error(self, outputs: Mapping[str, RequestOutput]) -> None:
        """Raise the first error that ended a request early. Call it once all requests have ended.

        Args:
            outputs: the call's outputs by request id, which the error takes

        Raises:
            NoNextTokenError: a request had no next token; the error names the prompt.
        """
        errors = self.errors
        for i, request in enumerate(self.requests):
            if request.error is not None:
                error = NoNextTokenError(f"prompt {i}: {request.error}")
                error.outputs = [each for id_, each in outputs.items() if id_ not in errors]
                error.unfinished = [each for id_, each in outputs.items() if id_ in errors]
                raise error


class Calls:
    """The calls of an engine. The engine runs a step when a call needs new outputs."""

    def __init__(self, coordinator: Coordinator, processor: OutputProcessor) -> None:
        self._coordinator = coordinator
        self._processor = processor
        self._lock = FairLock()
        self._call_of: dict[Request, Call] = {}  # the call of each running request
        self._ended_calls: deque[Call] = deque()  # their requests have to be aborted
        self._failure: WorkerError | None = None

    @contextmanager
    def begin(
        self,
        prompts: Sequence[tuple[str | None, list[int], SamplingParams, list[list[int]]]],
        output_kind: RequestOutputKind | None,
    ) -> Iterator[Call]:
        """Run requests while a `with` block runs. An exception in the block aborts them.

        Args:
            prompts: text, token ids, sampling parameters and bad word ids of each prompt
            output_kind: replaces the output kind of the sampling parameters

        Raises:
            ValueError: a request can never run; the error names the index of its prompt.
            RuntimeError: the engine is closed, or this thread is in the middle of a step.
        """
        call = Call()
        try:
            with Interrupts(), self.turn():
                self._refuse_if_closed()
                for i, prompt in enumerate(prompts):
                    try:
                        request = self._processor.add(*prompt, output_kind=output_kind)
                        call.requests.append(request)
                        # the other requests of a prompt differ only in their seeds
                        self._coordinator.check(request.engine_requests[0])
                    except ValueError as error:
                        raise ValueError(f"prompt {i}: {error}") from None
                for request in call.requests:
                    self._call_of[request] = call
                    self._coordinator.add(request.engine_requests)
            yield call
        except BaseException:
            self._ended_calls.append(call)
            self._end_calls()
            raise

    def advance(self, call: Call) -> list[RequestOutput]:
        """Return what is new of a call's requests, after as many steps as that takes.

        The list is empty where another thread has asked for its turn meanwhile. The turn is kept
        from step to step otherwise: taking it and guarding it from Ctrl-C anew costs some
        microseconds, after which a worker that waits for its next plan may have fallen asleep.

        Raises:
            WorkerError: a worker has failed, in this call or in another one.
            RuntimeError: the engine is closed.
        """
        with Interrupts() as interrupts, self.turn():
            while not call.changed:
                if self._failure is not None:
                    raise copy.copy(self._failure)  # each call adds its own outputs to the error
                self._refuse_if_closed()
                self._step()
                interrupts.check()  # Ctrl-C comes between two steps, with all records consistent
                if self._ended_calls or self._lock.has_waiters:
                    break
            return call.take()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the engine while a `with` block runs.

        Raises:
            RuntimeError: this thread already holds it and a signal handler calls.
        """
        try:
            with self._lock.hold():
                yield
        finally:
            if self._ended_calls:
                self._end_calls()

    def _refuse_if_closed(self) -> None:
        if self._coordinator.closed:
            raise RuntimeError("this LLM is closed; make a new one") from self._failure

    def _step(self) -> None:
        """Run one step of the engine. An exception closes the engine: its state is unknown then."""
        try:
            # the GPUs run the next step while the results of this one are detokenized
            processed = self._processor.process(self._coordinator.step())
            if processed.to_abort:
                self._coordinator.abort(processed.to_abort)
            for request in processed.changed:
                finished = request.finished
                call = self._call_of.pop(request) if finished else self._call_of[request]
                call.changed.append(request)
        except BaseException as error:
            if isinstance(error, WorkerError):
                self._failure = copy.copy(error)
            self._coordinator.kill()
            raise

    def _end_calls(self) -> None:
        """Abort the requests of ended calls, unless another thread holds the turn and does it.

        It never waits, since a finalizer may call it in the middle of any other code.
        """
        while self._ended_calls:
            with Interrupts(), self._lock.try_hold() as is_held:
                if not is_held:
                    return
                while self._ended_calls:
                    self._abort(self._ended_calls.popleft())
                with suppress(WorkerError):  # the next call raises it
                    self._finish_steps_in_flight()

    def _abort(self, call: Call) -> None:
        for request in call.requests:
            self._call_of.pop(request, None)
            self._processor.abort(request.request_id)
        if not self._coordinator.closed:
            ids = [each.request_id for r in call.requests for each in r.engine_requests]
            self._coordinator.abort(ids)

    def _finish_steps_in_flight(self) -> None:
        """If no request is left, wait for the steps in flight, so that the engine becomes idle."""
        coordinator = self._coordinator
        while not (coordinator.closed or coordinator.num_unfinished) and coordinator.num_in_flight:
            self._step()
