"""AsyncLLM: an engine for servers. Requests come and go at any time, each its own stream."""

import asyncio
import copy
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from itertools import count
from typing import Any, Self

from tpllm.config.engine_config import EngineConfig
from tpllm.config.settings import Settings, takes_settings
from tpllm.engine.stats import EngineStats
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import SamplingParams
from tpllm.supervision import messages
from tpllm.supervision.connection import Message
from tpllm.supervision.engine_client import EngineClient
from tpllm.supervision.processes import ClosedError
from tpllm.text.output_processor import OutputProcessor, Request
from tpllm.text.prompts import Prompt, as_list
from tpllm.text.tokenizer import Tokenizer, require_tokenizer
from tpllm.vllm_keywords import CALLS, without_absent

# Encoding this many characters takes about a millisecond, for which an event loop may well wait.
_LONG_TEXT = 4096
GENERATE = ("prompt", "sampling_params", "request_id")  # its keywords, besides vLLM's


class AsyncLLM(AbstractAsyncContextManager["AsyncLLM"]):
    """A model that continues prompts for many callers at once, from any event loop.

    The engine (scheduler and workers) has a process of its own; text is made into tokens and back
    here. Making one blocks until the engine is ready. Usable as an async context manager.

        async with AsyncLLM("Qwen/Qwen3-8B", tensor_parallel_size=2) as engine:
            async for output in engine.generate("The capital of France is", SamplingParams()):
                print(output.outputs[0].text)

    Args:
        model: local folder or Hugging Face id; None for the small model that ships with tpllm
        on_phase: called with rank and phase as the workers start, "loading weights" for one
        **settings: see `tpllm.config.settings.Settings` for every keyword

    Raises:
        ValueError, FileNotFoundError: a setting or file is wrong; no process is left running.
        WorkerError: the engine failed to start; likewise.
    """

    @takes_settings
    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        on_phase: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> None:
        begin = time.perf_counter()
        self.config = EngineConfig.resolve(model, **settings)
        self._tokenizer: Tokenizer | None = None
        client: EngineClient | None = None
        self._encoder = ThreadPoolExecutor(1, "tpllm-tokenizer")  # for long texts
        try:
            if self.config.tokenizer_folder is not None:
                self._tokenizer = Tokenizer(self.config.tokenizer_folder)
                loading = self._encoder.submit(self._tokenizer.load)  # while the engine starts
            client = EngineClient(self.config, on_phase=on_phase)
            if self._tokenizer is not None:
                loading.result()
        except BaseException:
            if client is not None:
                client.kill()
            self._encoder.shutdown(wait=False)
            raise
        # what the cache holds may be less than the model's limit
        self.config = replace(self.config, max_model_len=client.max_total_tokens)
        self._client = client
        self._streams = _Streams(client, OutputProcessor(self._tokenizer))
        self._streams.start()
        # the streams' thread holds no AsyncLLM, so that this runs when nobody else does either
        weakref.finalize(self, client.kill)
        self.startup_s = time.perf_counter() - begin

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **vllm_keywords: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue a prompt; yields as it grows, in the form of `sampling_params.output_kind`.

        A caller slower than the model gets several steps in one output. Closing the generator, or
        cancelling the task that iterates it, aborts the request.

        Args:
            prompt: a text, a list of token ids, `{"prompt_token_ids": [...]}` or
                `{"prompt": "..."}`
            sampling_params: None for `get_default_sampling_params()`
            request_id: what `abort` calls it; None for one that no other request has
            **vllm_keywords: those of vLLM that do not exist here, with values that ask for nothing

        Raises (at the first iteration):
            ValueError: the prompt cannot run. NoNextTokenError, one of these, comes at any
                iteration: the request's settings have left no next token.
            WorkerError: the engine has failed, now or earlier: see `dead_error`.
            RuntimeError: the engine is closed.
        """
        if vllm_keywords:
            without_absent("AsyncLLM.generate", vllm_keywords, CALLS, GENERATE)
        params = sampling_params
        if params is None:
            params = self.get_default_sampling_params()
        elif not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params={params!r} must be SamplingParams")
        if request_id is not None and not isinstance(request_id, str):
            raise ValueError(f"request_id={request_id!r} must be a text")
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
        """End a request, or several; its stream yields what there is, with reason "abort".

        Harmless for requests that are unknown or have ended.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        for each in ids:
            self._streams.abort(each)

    async def stats(self) -> EngineStats:
        """What the engine is doing; it answers between two steps.

        Raises:
            WorkerError: the engine has failed.
            RuntimeError: the engine is closed.
        """
        return await asyncio.wrap_future(self._streams.ask_for_stats())

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: the engine was made without one.
        """
        return require_tokenizer(self._tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without sampling parameters gets: see the setting `generation_config`."""
        return self.config.default_sampling_params

    @property
    def dead_error(self) -> BaseException | None:
        """Why the engine has failed; None while it works, and when it was closed."""
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
        """Give processes, shared memory and GPU memory back. Harmless when repeated.

        Streams that are open end with a RuntimeError.
        """
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """As `close`, for callers without an event loop; waits until everything is gone."""
        self._client.close()
        self._streams.join()
        self._encoder.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _encode(self, text: str) -> list[int]:
        return (await self._tokenize(self.get_tokenizer().encode_batch, [text]))[0]

    async def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """An empty list without a tokenizer: the processor refuses the words then."""
        if not params.bad_words or self._tokenizer is None:
            return []
        return await self._tokenize(self._tokenizer.bad_word_ids, list(params.bad_words))

    async def _tokenize(
        self, function: Callable[[list[str]], list[list[int]]], texts: list[str]
    ) -> list[list[int]]:
        if sum(map(len, texts)) < _LONG_TEXT:
            return function(texts)
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, texts)


AsyncLLM.__doc__ = f"{AsyncLLM.__doc__}\n    Settings:\n{Settings.__doc__}"


class _Stream:
    """One caller's end of a request, on the event loop that it was opened in."""

    def __init__(self, streams: "_Streams", request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.error: BaseException | None = None
        self._streams = streams
        self._has_news = asyncio.Event()

    def wake(self) -> None:
        """Call it on the loop."""
        self._has_news.set()

    async def next(self) -> RequestOutput:
        """What is new; sleeps until something is.

        Raises:
            ValueError: the engine refused the request.
            WorkerError, RuntimeError: nothing more comes.
        """
        while True:
            # set by the loop alone: who takes longer than a step gives others their turn, too
            await self._has_news.wait()
            self._has_news.clear()
            output = self._streams.take(self)
            if output is not None:  # else the wake-up came late, for what had been taken
                if self.error is not None:
                    self._has_news.set()  # that is next
                return output


class _Streams:
    """The open streams of an engine, and the thread that reads what it sends.

    The thread makes the texts too: an event loop only takes what is ready. Both hold the lock for
    the books of a step at most.
    """

    def __init__(self, client: EngineClient, processor: OutputProcessor) -> None:
        self.dead_error: BaseException | None = None
        self._client = client
        self._processor = processor
        self._lock = threading.Lock()
        self._open: dict[Request, _Stream] = {}
        self._questions: dict[int, Future[EngineStats]] = {}
        self._numbers = count()
        self._end: BaseException | None = None  # why nothing more comes
        self._thread = threading.Thread(target=self._run, name="tpllm-streams", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

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
            self._refuse_if_over()
            request = self._processor.add(text, ids, params, bad_word_ids, request_id=request_id)
            try:
                self._client.send(messages.add(request.engine_requests))
            except (ValueError, OverflowError) as error:
                self._processor.abort(request.request_id)
                raise ValueError(f"the engine cannot be told of this request: {error}") from None
            stream = self._open[request] = _Stream(self, request)
        return stream

    def take(self, stream: _Stream) -> RequestOutput | None:
        with self._lock:
            if stream.request.error is not None:
                raise stream.request.error
            if stream.request.has_news:
                return stream.request.take()
            if stream.error is not None:
                raise stream.error
            return None

    def close(self, stream: _Stream) -> None:
        """The caller wants no more of it; aborts the request if it still runs."""
        with self._lock:
            # one that has ended left its id, and a new request may have it
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

    def ask_for_stats(self) -> "Future[EngineStats]":
        with self._lock:
            self._refuse_if_over()
            number = next(self._numbers)
            question = self._questions[number] = Future()
            self._client.send({"type": "stats", "number": number})
        return question

    def _refuse_if_over(self) -> None:
        """Raise why nothing more comes, once the thread has noted it.

        Between the end of the client and that note, only the thread can tell whether the engine
        failed or was closed: it ends what is opened meanwhile.
        """
        if self._end is not None:
            raise _again(self._end)

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                received = self._client.receive()
                with self._lock:
                    self._take_in(received)
        except ClosedError:
            with self._lock:
                self._end_all(RuntimeError("this AsyncLLM is closed; make a new one"))
        except BaseException as error:
            self._client.kill()
            self.dead_error = error
            with self._lock:
                self._end_all(error)

    def _take_in(self, received: list[Message]) -> None:
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
                question = self._questions.pop(message["number"])
                if question.set_running_or_notify_cancel():
                    question.set_result(messages.read_stats(message))
        self._wake([self._open[request] for request in changed if request in self._open])

    def _end_all(self, error: BaseException) -> None:
        self._end = error
        for stream in self._open.values():
            stream.error = _again(error)
        self._wake(list(self._open.values()))
        for question in self._questions.values():
            if question.set_running_or_notify_cancel():
                question.set_exception(_again(error))

    def _wake(self, streams: list[_Stream]) -> None:
        """Tell the loops of these streams, each loop once: a step may have news for hundreds."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for stream in streams:
            by_loop.setdefault(stream.loop, []).append(stream)
        for loop, of_loop in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(_wake_all, of_loop)


def _wake_all(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.wake()


def _again(error: BaseException) -> BaseException:
    """A copy to raise: one exception raised in many tasks would collect their tracebacks."""
    try:
        return copy.copy(error)
    except TypeError:  # its constructor wants something else than it keeps
        return RuntimeError(f"{type(error).__name__}: {error}")
