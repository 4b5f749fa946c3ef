"""AsyncLLM: the engine for servers. Requests start at any time, and each has its own stream."""

import asyncio
import copy
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

from tpllm.engine.stats import EngineStats
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import SamplingParams
from tpllm.supervision import messages
from tpllm.supervision.connection import Message
from tpllm.supervision.engine_client import EngineClient
from tpllm.supervision.processes import ClosedError
from tpllm.text.frontend import Frontend, OnPhase
from tpllm.text.output_processor import OutputProcessor, Request
from tpllm.text.prompts import Prompt, as_list
from tpllm.vllm_keywords import check_keywords

# Encoding this many characters takes about a millisecond, which an event loop can afford.
_LONG_TEXT = 4096


class AsyncLLM(Frontend[EngineClient], AbstractAsyncContextManager["AsyncLLM"]):
    """A model that continues prompts for many callers at once, from any event loop.

    The engine (scheduler and workers) runs in a process of its own. This object encodes prompts
    and decodes tokens. The constructor blocks until the engine is ready. The object is an async
    context manager.

        async with AsyncLLM("Qwen/Qwen3-8B", tensor_parallel_size=2) as engine:
            async for output in engine.generate("The capital of France is", SamplingParams()):
                print(output.outputs[0].text)

    Args:
        model: local folder or Hugging Face id; None for the small model that ships with tpllm
        on_phase: called with rank and phase as the workers start, such as "loading weights"
        **settings: see `tpllm.config.settings.Settings` for every keyword

    Raises:
        ValueError, FileNotFoundError: a setting or file is wrong; no process is left running.
        WorkerError: the engine failed to start; no process is left running.
    """

    def _start(self, on_phase: OnPhase | None) -> EngineClient:
        return EngineClient(self.config, on_phase=on_phase)

    def _use(self, engine: EngineClient) -> None:
        # the KV cache may hold fewer tokens than the model's limit
        self.config = replace(self.config, max_model_len=engine.max_total_tokens)
        self._client = engine
        self._streams = _Streams(engine, OutputProcessor(self._tokenizer))
        self._streams.thread.start()
        # the streams' thread holds no reference to this object, so the finalizer can run
        weakref.finalize(self, engine.kill)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **vllm_keywords: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt, and yield outputs as tokens arrive.

        `sampling_params.output_kind` decides what each output holds. If the caller is slower than
        the model, one output holds several steps. Closing the generator, or cancelling the task
        that iterates it, aborts the request.

        Args:
            prompt: a string, a list of token ids, `{"prompt_token_ids": [...]}` or
                `{"prompt": "..."}`
            sampling_params: None for `get_default_sampling_params()`
            request_id: the name by which `abort` finds the request; None for a new unique one
            **vllm_keywords: vLLM's keywords that tpllm lacks, with values that have no effect

        Raises (at the first iteration):
            ValueError: the prompt cannot run. Its subclass NoNextTokenError can be raised at any
                iteration: the request's settings have left no next token.
            WorkerError: the engine has failed, now or earlier: see `dead_error`.
            RuntimeError: the engine is closed.
        """
        check_keywords(AsyncLLM.generate, vllm_keywords)
        params = sampling_params
        if params is None:
            params = self.get_default_sampling_params()
        elif not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params={params!r} must be SamplingParams")
        if request_id is not None and not isinstance(request_id, str):
            raise ValueError(f"request_id={request_id!r} must be a string")
        (given,) = as_list([prompt])
        text = given if isinstance(given, str) else None
        ids = await self._encode(given) if isinstance(given, str) else given
        bad_word_ids = await self._bad_word_ids(params)
        stream = self._streams.open(text, ids, params, bad_word_ids, request_id)
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            self._streams.close(stream)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End one or several requests. Each stream yields its last output, with reason "abort".

        Ids of requests that are unknown or have ended are ignored.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        for each in ids:
            self._streams.abort(each)

    async def stats(self) -> EngineStats:
        """Return the engine's statistics. The engine replies between two steps.

        Raises:
            WorkerError: the engine has failed.
            RuntimeError: the engine is closed.
        """
        return await asyncio.wrap_future(self._streams.request_stats())

    @property
    def dead_error(self) -> BaseException | None:
        """The error that ended the engine; None while it runs, and after `close`."""
        return self._streams.dead_error

    @property
    def engine_pid(self) -> int:
        """The process id of the engine."""
        return self._client.pid

    @property
    def worker_pids(self) -> list[int]:
        """The process id of each rank's worker, a child of the engine's process."""
        return self._client.worker_pids

    async def close(self) -> None:
        """Release processes, shared memory and GPU memory. It may be called repeatedly.

        Open streams end with a RuntimeError.
        """
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """Do as `close`, for callers without an event loop; wait until every process has ended."""
        self._client.close()
        self._streams.thread.join()

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _encode(self, text: str) -> list[int]:
        return (await self._tokenize(self.get_tokenizer().encode_batch, [text]))[0]

    async def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """Return the token ids of bad words; `OutputProcessor` refuses them without a tokenizer."""
        if not params.bad_words or self._tokenizer is None:
            return []
        return await self._tokenize(self._tokenizer.bad_word_ids, list(params.bad_words))

    async def _tokenize(
        self, function: Callable[[list[str]], list[list[int]]], texts: list[str]
    ) -> list[list[int]]:
        if sum(map(len, texts)) < _LONG_TEXT:
            return function(texts)
        return await asyncio.to_thread(function, texts)


class _Stream:
    """The output queue of one request, on the event loop of its caller."""

    def __init__(self, streams: "_Streams", request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.error: BaseException | None = None
        self._streams = streams
        self.has_output = asyncio.Event()

    async def next(self) -> RequestOutput:
        """Wait for the next output, and return it.

        Raises:
            ValueError: the engine refused the request.
            WorkerError, RuntimeError: the engine has failed or was closed.
        """
        while True:
            # only the loop sets the event, so a slow caller still yields to other tasks
            await self.has_output.wait()
            self.has_output.clear()
            output = self._streams.take(self)
            if output is not None:  # None: an earlier call has taken this output
                if self.error is not None:
                    self.has_output.set()  # the next call raises it
                return output


class _Streams:
    """The open streams of an engine, and the thread that reads the engine's messages.

    The thread also decodes tokens, so an event loop only takes finished outputs. Both sides hold
    the lock for the bookkeeping of one step at most.
    """

    def __init__(self, client: EngineClient, processor: OutputProcessor) -> None:
        self.dead_error: BaseException | None = None
        self._client = client
        self._processor = processor
        self._lock = threading.Lock()
        self._open: dict[Request, _Stream] = {}
        self._stats_futures: dict[int, Future[EngineStats]] = {}
        self._numbers = count()
        self._end: BaseException | None = None  # why the engine sends nothing more
        self.thread = threading.Thread(target=self._run, name="tpllm-streams", daemon=True)

    # ---- from an event loop ------------------------------------------------------------------

    def open(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        bad_word_ids: list[list[int]],
        request_id: str | None,
    ) -> _Stream:
        with self._lock:
            self._raise_if_ended()
            request = self._processor.add(text, ids, params, bad_word_ids, request_id=request_id)
            try:
                self._client.send(messages.add(request.engine_requests))
            except (ValueError, OverflowError) as error:
                self._processor.abort(request.request_id)
                raise ValueError(f"the request cannot be sent to the engine: {error}") from None
            stream = self._open[request] = _Stream(self, request)
        return stream

    def take(self, stream: _Stream) -> RequestOutput | None:
        with self._lock:
            if stream.request.error is not None:
                raise stream.request.error
            if stream.request.has_new_output:
                return stream.request.take()
            if stream.error is not None:
                raise stream.error
            return None

    def close(self, stream: _Stream) -> None:
        """Forget a stream, and abort its request if it still runs."""
        with self._lock:
            # a new request may have the id of one that has ended
            if self._open.pop(stream.request, None) is not None and not stream.request.finished:
                self._abort(stream.request.request_id)

    def abort(self, request_id: str) -> None:
        with self._lock:
            request = self._abort(request_id)
            if request is not None:
                self._wake([self._open[request]])

    def _abort(self, request_id: str) -> Request | None:
        aborted = self._processor.abort(request_id)
        if aborted is None:
            return None
        request, engine_ids = aborted
        self._client.send({"type": "abort", "request_ids": engine_ids})
        return request

    def request_stats(self) -> "Future[EngineStats]":
        with self._lock:
            self._raise_if_ended()
            number = next(self._numbers)
            future = self._stats_futures[number] = Future()
            self._client.send({"type": "stats", "number": number})
        return future

    def _raise_if_ended(self) -> None:
        """Raise the error that ended the engine, once the thread has recorded it.

        Until then only the thread knows whether the engine failed or was closed. The thread also
        ends the streams that are opened in the meantime.
        """
        if self._end is not None:
            raise _copy_of(self._end)

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                received = self._client.receive()
                with self._lock:
                    self._handle(received)
        except ClosedError:
            with self._lock:
                self._end_all(RuntimeError("this AsyncLLM is closed; make a new one"))
        except BaseException as error:
            self._client.kill()
            self.dead_error = error
            with self._lock:
                self._end_all(error)

    def _handle(self, received: list[Message]) -> None:
        changed: dict[Request, None] = {}
        for message in received:
            kind = message["type"]
            if kind == "updates":
                processed = self._processor.process(messages.read_updates(message))
                changed.update(dict.fromkeys(processed.changed))
                if processed.to_abort:
                    self._client.send({"type": "abort", "request_ids": processed.to_abort})
            elif kind == "refused":
                request = self._processor.drop(message["request_ids"])
                if request is not None:
                    self._open[request].error = ValueError(message["error"])
                    changed[request] = None
            elif kind == "stats":
                future = self._stats_futures.pop(message["number"])
                if future.set_running_or_notify_cancel():
                    future.set_result(messages.read_stats(message))
        self._wake([self._open[request] for request in changed if request in self._open])

    def _end_all(self, error: BaseException) -> None:
        self._end = error
        for stream in self._open.values():
            stream.error = _copy_of(error)
        self._wake(list(self._open.values()))
        for future in self._stats_futures.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(_copy_of(error))

    def _wake(self, streams: list[_Stream]) -> None:
        """Wake these streams, with one call per event loop: a step may have hundreds of outputs."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for stream in streams:
            by_loop.setdefault(stream.loop, []).append(stream)
        for loop, of_loop in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed, so no task waits
                loop.call_soon_threadsafe(_wake_all, of_loop)


def _wake_all(streams: list[_Stream]) -> None:
    """Wake the tasks that wait in `next`. Only code on their event loop may call this."""
    for stream in streams:
        stream.has_output.set()


def _copy_of(error: BaseException) -> BaseException:
    """Return a copy to raise: one exception raised in many tasks collects all their tracebacks."""
    try:
        return copy.copy(error)
    except TypeError:  # the constructor takes other arguments than `args` holds
        return RuntimeError(f"{type(error).__name__}: {error}")
