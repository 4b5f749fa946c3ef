"""Calls of one LLM, from any threads: their requests run side by side, in the same steps.

A call has the engine for a step at a time. Between two of them others have their turn, so a stream
that nobody asks for more keeps nobody waiting, whichever threads ask; its requests go on with the
steps of the others.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tpllm.engine.coordinator import Coordinator
from tpllm.errors import NoNextTokenError, WorkerError
from tpllm.offline.turns import Turns
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.supervision.interrupts import Interrupts
from tpllm.text.output_processor import OutputProcessor, Request


class Call:
    """The requests of one call.

    Attributes:
        changed: those with something to take, some of them more than once
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.changed: deque[Request] = deque()

    def take(self) -> list[RequestOutput]:
        """What is new. The caller has the turn: a step in another thread would write to it."""
        outputs = []
        while self.changed:
            request = self.changed.popleft()
            if request.has_news:
                outputs.append(request.take())
        return outputs

    @property
    def errors(self) -> dict[str, NoNextTokenError]:
        """Why requests have ended before their time, by their ids."""
        return {each.request_id: each.error for each in self.requests if each.error is not None}

    def raise_first_error(self, outputs: Mapping[str, RequestOutput]) -> None:
        """Raise what ended a request before its time, once all have ended.

        Args:
            outputs: those of the call, by request id, for the error to hold

        Raises:
            NoNextTokenError: names the prompt.
        """
        errors = self.errors
        for i, request in enumerate(self.requests):
            if request.error is not None:
                error = NoNextTokenError(f"prompt {i}: {request.error}")
                error.outputs = [each for id_, each in outputs.items() if id_ not in errors]
                error.unfinished = [each for id_, each in outputs.items() if id_ in errors]
                raise error


class Calls:
    """The calls of an engine, which steps as they ask for more."""

    def __init__(self, coordinator: Coordinator, processor: OutputProcessor) -> None:
        self._coordinator = coordinator
        self._processor = processor
        self._turns = Turns()
        self._call_of: dict[Request, Call] = {}  # of those that run
        self._over: deque[Call] = deque()  # whose requests are to be aborted
        self._failure: WorkerError | None = None

    @contextmanager
    def begin(
        self,
        prompts: Sequence[tuple[str | None, list[int], SamplingParams, list[list[int]]]],
        output_kind: RequestOutputKind | None,
    ) -> Iterator[Call]:
        """Run requests for the length of a block; whatever ends it early aborts them.

        Args:
            prompts: of each its text, its token ids, its parameters and the ids of their bad words
            output_kind: instead of that of the parameters

        Raises:
            ValueError: one of them could never run; it is named by its index as a prompt.
            RuntimeError: the engine is closed, or this very thread is in the middle of a step.
        """
        call = Call()
        try:
            with Interrupts(), self.turn():
                self._refuse_if_closed()
                for i, prompt in enumerate(prompts):
                    try:
                        request = self._processor.add(*prompt, output_kind=output_kind)
                        call.requests.append(request)
                        # the others of one prompt differ in their seeds alone
                        self._coordinator.check(request.engine_requests[0])
                    except ValueError as error:
                        raise ValueError(f"prompt {i}: {error}") from None
                for request in call.requests:
                    self._call_of[request] = call
                    self._coordinator.add(request.engine_requests)
            yield call
        except BaseException:
            self._over.append(call)
            self._end_calls()
            raise

    def advance(self, call: Call) -> list[RequestOutput]:
        """Return what is new of a call's requests, after as many steps as that takes.

        The list is empty where another thread has asked for its turn meanwhile. The turn is kept
        from step to step otherwise: taking it and guarding it from Ctrl-C anew costs some
        microseconds, after which a worker that waits for its next plan may have fallen asleep.

        Raises:
            WorkerError: a worker has failed, in this call or in another.
            RuntimeError: the engine has been closed.
        """
        with Interrupts() as interrupts, self.turn():
            while not call.changed:
                if self._failure is not None:
                    raise copy.copy(self._failure)  # each call adds its own outputs
                self._refuse_if_closed()
                self._step()
                interrupts.check()  # Ctrl-C comes between two steps, with the books in order
                if self._over or self._turns.is_awaited:
                    break
            return call.take()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the engine for the length of a block.

        Raises:
            RuntimeError: this thread has it, and was interrupted by a signal handler.
        """
        try:
            with self._turns.take():
                yield
        finally:
            if self._over:
                self._end_calls()

    def _refuse_if_closed(self) -> None:
        if self._coordinator.closed:
            raise RuntimeError("this LLM is closed; make a new one") from self._failure

    def _step(self) -> None:
        """One step of the engine; in the middle of it nothing is certain."""
        try:
            # the next step runs on the GPUs while we read the texts of this one
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
        """Abort the requests of calls that are over; where others have the turn, they do it.

        Never waits: it may come from a finalizer, so in the middle of anything.
        """
        while self._over:
            with Interrupts(), self._turns.try_take() as has_turn:
                if not has_turn:
                    return
                while self._over:
                    self._abort(self._over.popleft())
                with suppress(WorkerError):  # nobody's requests: the next call hears of it
                    self._come_to_rest()

    def _abort(self, call: Call) -> None:
        for request in call.requests:
            self._call_of.pop(request, None)
            self._processor.abort(request.request_id)
        if not self._coordinator.closed:
            ids = [each.request_id for r in call.requests for each in r.engine_requests]
            self._coordinator.abort(ids)

    def _come_to_rest(self) -> None:
        """Without requests, take in what is in flight: the next call finds a quiet engine."""
        coordinator = self._coordinator
        while not (coordinator.closed or coordinator.num_unfinished) and coordinator.num_in_flight:
            self._step()
