"""LLM: the offline API. Prompts in, texts out, in one call."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import fields
from inspect import Parameter, Signature
from typing import Any, Self, Unpack

from tqdm import tqdm

from tpllm.config import EngineConfig
from tpllm.engine.coordinator import Coordinator
from tpllm.engine.request import AddRequest, RequestUpdate
from tpllm.errors import WorkerError
from tpllm.interrupts import Interrupts
from tpllm.outputs import CompletionOutput, RequestOutput
from tpllm.prompts import Prompt, as_list, one_for_each
from tpllm.sampling_params import SamplingParams
from tpllm.settings import Settings, SettingsKeywords
from tpllm.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM(AbstractContextManager["LLM"]):
    """A model, running in one process per GPU, that continues prompts.

    Usable as a context manager; `close()`, `del` and the end of the program give everything back
    as well. Calls from several threads take turns.

    Args:
        model: local folder or Hugging Face id; None for the small model that ships with tpllm
        **settings: see `tpllm.settings.Settings` for every keyword

    Raises:
        ValueError, FileNotFoundError: a setting or file is wrong; no process has been started, or,
            where only a device or transformers' tokenizer could tell, none is left.
        WorkerError: a worker failed to start; none is left.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        **settings: Unpack[SettingsKeywords],
    ) -> None:
        begin = time.perf_counter()
        self.config = EngineConfig.resolve(model, **settings)
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()
        self._lock_owner: int | None = None
        self._num_requests = 0
        coordinator: Coordinator | None = None
        try:
            with ThreadPoolExecutor(1, "tpllm-tokenizer") as pool:  # while the workers start
                if self.config.tokenizer_folder is not None:
                    self._tokenizer = Tokenizer(self.config.tokenizer_folder)
                    loading = pool.submit(self._tokenizer.load)
                coordinator = Coordinator(self.config)
            if self._tokenizer is not None:
                loading.result()
        except BaseException:
            if coordinator is not None:
                coordinator.kill()
            raise
        self._coordinator = coordinator
        self.startup_s = time.perf_counter() - begin

    # ---- generating --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; the outputs are in the order of the prompts.

        Ctrl-C ends the call's requests and leaves the engine ready for the next call. An exception
        that a signal handler of the program's own raises ends the engine: it may come in the
        middle of a step.

        Args:
            prompts: a text, a list of token ids, `{"prompt_token_ids": [...]}` or
                `{"prompt": "..."}`, or a list of any of these
            sampling_params: one for all prompts, or one for each
            use_tqdm: whether to show progress, with input and output tokens per second

        Raises:
            ValueError: a prompt cannot run; none has been started then.
            WorkerError: a worker failed; the engine is closed. The error holds the outputs of the
                prompts that had finished, and what the others had produced.
        """
        texts, prompt_ids = self._encode(as_list(prompts))
        return self._run(texts, prompt_ids, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "..."}]`, or a list of such conversations

        Raises:
            ValueError: there is no chat template, or it does not take these messages; and as
                `generate`.
        """
        tokenizer = self.get_tokenizer()
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(
                f"messages={messages!r} must be a list of messages, or a list of lists"
            )
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        texts = []
        for i, conversation in enumerate(conversations):
            try:
                texts.append(tokenizer.render_chat(conversation))
            except ValueError as error:
                raise ValueError(f"conversation {i}: {error}") from None
        # the template spells out every special token
        prompt_ids = tokenizer.encode_batch(texts, add_special_tokens=False)
        return self._run([*texts], prompt_ids, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: the engine was made without one.
        """
        if self._tokenizer is None:
            raise ValueError(
                "this engine has no tokenizer (skip_tokenizer_init=True, or dummy weights without "
                "one); pass token ids, or name a tokenizer with tokenizer="
            )
        return self._tokenizer

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, as between two repeats of a measurement."""
        with self._turn():
            self._coordinator.reset_prefix_cache()

    @property
    def coordinator(self) -> Coordinator:
        """The engine behind this object: its statistics, and where its time goes."""
        return self._coordinator

    # ---- ending ------------------------------------------------------------------------------

    def close(self) -> None:
        """Give processes, shared memory and GPU memory back. Harmless when repeated.

        A call that another thread is in ends with a RuntimeError.
        """
        self._coordinator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------

    def _encode(self, prompts: list[str | list[int]]) -> tuple[list[str | None], list[list[int]]]:
        """Text (None where it came as ids) and token ids of every prompt, encoded in one go."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(self.get_tokenizer().encode_batch(texts) if texts else [])
        return (
            [prompt if isinstance(prompt, str) else None for prompt in prompts],
            [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts],
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the calls of other threads; refuse one from inside our own call.

        Raises:
            RuntimeError: a signal handler calls while `generate` runs in the same thread.
        """
        me = threading.get_ident()
        if self._lock_owner == me:
            raise RuntimeError("this LLM is in the middle of a call, by this very thread")
        with self._lock:
            self._lock_owner = me
            try:
                yield
            finally:
                self._lock_owner = None

    def _run(
        self,
        texts: list[str | None],
        prompt_ids: list[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = one_for_each(sampling_params, len(prompt_ids))
        with self._turn():
            if self._coordinator.closed:
                raise RuntimeError("this LLM is closed; make a new one")
            first = self._num_requests
            requests = [
                AddRequest(str(first + i), ids, each)
                for i, (ids, each) in enumerate(zip(prompt_ids, params, strict=True))
            ]
            collected = {request.request_id: _Collected() for request in requests}
            try:
                self._drive(requests, collected, use_tqdm)
            except WorkerError as error:
                outputs = self._outputs(requests, texts, collected)
                error.outputs = [output for output in outputs if output.finished]
                error.unfinished = [output for output in outputs if not output.finished]
                raise
        return self._outputs(requests, texts, collected)

    def _drive(
        self, requests: list[AddRequest], collected: dict[str, "_Collected"], use_tqdm: bool
    ) -> None:
        """Run requests to their ends, or abort them all when something interrupts."""
        num_prompt_tokens = {r.request_id: len(r.prompt_token_ids) for r in requests}
        try:
            with Interrupts() as interrupts:
                self._coordinator.add(requests)
                self._num_requests += len(requests)
                num_running = len(requests)
                with closing(_Progress(len(requests), use_tqdm)) as progress:
                    while num_running:
                        interrupts.check()
                        for update in self._coordinator.step():
                            of_request = collected[update.request_id]
                            of_request.add(update)
                            if update.finish_reason is not None:
                                num_running -= 1
                                progress.finished(
                                    num_prompt_tokens[update.request_id], len(of_request.token_ids)
                                )
        except BaseException:
            self._abandon(requests)
            raise

    def _abandon(self, requests: list[AddRequest]) -> None:
        """Abort and take in what is in flight, so that the next call finds a quiet engine."""
        coordinator = self._coordinator
        if coordinator.closed:
            return
        try:
            coordinator.abort(request.request_id for request in requests)
            while coordinator.num_in_flight:
                coordinator.step()
        except BaseException:  # interrupted again, in the middle: nothing is certain any more
            coordinator.kill()
            raise

    def _outputs(
        self,
        requests: list[AddRequest],
        texts: list[str | None],
        collected: dict[str, "_Collected"],
    ) -> list[RequestOutput]:
        return [
            self._output(request, text, collected[request.request_id])
            for request, text in zip(requests, texts, strict=True)
        ]

    def _output(
        self, request: AddRequest, text: str | None, collected: "_Collected"
    ) -> RequestOutput:
        shown = collected.token_ids
        if collected.finish_reason == "stop":
            shown = shown[:-1]  # the token that ends a text is not part of it
        completion = CompletionOutput(
            index=0,
            text=self._tokenizer.decode(shown) if self._tokenizer else "",
            token_ids=collected.token_ids,
            finish_reason=collected.finish_reason,
            stop_reason=collected.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=text,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=collected.finish_reason is not None,
            num_cached_tokens=collected.num_cached_tokens,
        )


def _signature() -> Signature:
    """`LLM(model=None, *, tensor_parallel_size=1, ...)`, for help() and notebooks."""
    model = Parameter("model", Parameter.POSITIONAL_OR_KEYWORD, default=None)
    keywords = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
        if field.name != "model"
    ]
    return Signature([model, *keywords])


LLM.__signature__ = _signature()  # type: ignore[attr-defined]
LLM.__doc__ = f"{LLM.__doc__}\n    Settings:\n{Settings.__doc__}"


class _Collected:
    """What has come back for one request so far."""

    __slots__ = ("finish_reason", "num_cached_tokens", "stop_reason", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: Any = None
        self.stop_reason: int | None = None
        self.num_cached_tokens = 0

    def add(self, update: RequestUpdate) -> None:
        self.token_ids += update.new_token_ids
        self.finish_reason = update.finish_reason
        self.stop_reason = update.stop_reason
        self.num_cached_tokens = update.num_cached_tokens


class _Progress:
    """A bar of finished prompts, with input and output tokens per second."""

    def __init__(self, num_requests: int, enabled: bool) -> None:
        self._bar = tqdm(
            total=num_requests,
            desc="Processed prompts",
            unit="prompt",
            disable=not (enabled and num_requests),
        )
        self._begin = time.perf_counter()
        self._input = self._output = 0

    def finished(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._input += num_prompt_tokens
        self._output += num_output_tokens
        if self._bar.disable:
            return
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        self._bar.set_postfix_str(
            f"input {self._input / seconds:.0f} tok/s, output {self._output / seconds:.0f} tok/s",
            refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
