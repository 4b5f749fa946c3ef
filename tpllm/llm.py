"""LLM: the offline API, which continues a batch of prompts in one call."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from tpllm.engine.coordinator import Coordinator
from tpllm.engine.stats import EngineStats
from tpllm.errors import WorkerError
from tpllm.offline.beam_search import Beams, BeamSearchOutput, BeamSearchParams
from tpllm.offline.calls import Call, Calls
from tpllm.offline.profiler import Profiler
from tpllm.outputs import RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.supervision.start import start_engine
from tpllm.text.frontend import Frontend, OnPhase
from tpllm.text.output_processor import OutputProcessor
from tpllm.text.prompts import Prompt, as_list, one_for_each, plain_list
from tpllm.vllm_keywords import check_keywords

Message = Mapping[str, Any]


class LLM(Frontend[Coordinator], AbstractContextManager["LLM"]):
    """A model, running in one process per GPU, that continues prompts.

    The object is a context manager. `close()`, `del` and the end of the program release its
    resources as well. Calls from several threads, and open streams, share the same steps. A call
    from a signal handler that interrupts a step is refused.

    Args:
        model: local folder or Hugging Face id; None for the small model that ships with tpllm
        on_phase: called with rank and phase as the workers start, such as "loading weights"
        **settings: see `tpllm.config.settings.Settings` for every keyword

    Raises:
        ValueError, FileNotFoundError: a setting or file is wrong; no process is left running.
        WorkerError: a worker failed to start; no process is left running.
    """

    def _start(self, on_phase: OnPhase | None) -> Coordinator:
        return start_engine(self.config, on_phase=on_phase)

    def _use(self, engine: Coordinator) -> None:
        self._coordinator = engine
        self._calls = Calls(engine, OutputProcessor(self._tokenizer))

    # ---- generating --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **vllm_keywords: Any,
    ) -> list[RequestOutput]:
        """Continue every prompt, and return the outputs in the order of the prompts.

        Ctrl-C ends the call's requests and leaves the engine ready for the next call. An exception
        from any other signal handler ends the engine, because it may interrupt a step.

        Args:
            prompts: a string, a list of token ids, `{"prompt_token_ids": [...]}` or
                `{"prompt": "..."}`, or a list (or generator) of any of these
            sampling_params: one for all prompts, or one for each; None for
                `get_default_sampling_params()`
            use_tqdm: whether to show progress, with input and output tokens per second
            **vllm_keywords: vLLM's keywords that tpllm lacks, with values that have no effect

        Raises:
            ValueError: a prompt cannot run; no prompt has been started.
            NoNextTokenError: the settings of a prompt have left it no next token. It is raised
                once the other prompts have ended, and holds their outputs.
            WorkerError: a worker failed; the engine is closed. The error holds the outputs of the
                prompts that had finished, and what the others had produced.
        """
        check_keywords(LLM.generate, vllm_keywords)
        texts, prompt_ids = self._encode(as_list(prompts))
        return self._run(texts, prompt_ids, sampling_params, use_tqdm)

    def generate_stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Continue every prompt, and yield outputs as tokens arrive.

        `output_kind` of the sampling parameters decides what each output holds. The last output of
        each prompt is `finished`. The model runs while a caller iterates this generator, or while
        another call runs. Any thread may iterate it, one at a time. Closing or deleting the
        generator aborts the requests that are left.

        The arguments are those of `generate`, and so are the errors, at the first iteration.
        """
        texts, prompt_ids = self._encode(as_list(prompts))
        with self._begin(texts, prompt_ids, sampling_params, None) as call:
            num_running = len(call.requests)
            while num_running:
                for output in self._calls.advance(call):
                    num_running -= output.finished
                    if output.request_id not in call.errors:
                        yield output
            call.raise_first_error({})

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **vllm_keywords: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, through the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "..."}]`, or a list of such conversations, in
                any format of OpenAI's clients; the server accepts the same
            chat_template: a Jinja template to use instead of the model's
            add_generation_prompt: end the prompt with the header of the assistant's answer
            continue_final_message: leave the last message open, so that the model continues it;
                requires `add_generation_prompt=False`
            tools: JSON schemas of functions that the model may call
            chat_template_kwargs: further variables of the template, such as `enable_thinking`
            **vllm_keywords: as for `generate`

        Raises:
            ValueError: there is no chat template, or it cannot render these messages, or a prompt
                cannot run.
            NoNextTokenError, WorkerError: as in `generate`.
        """
        check_keywords(LLM.chat, vllm_keywords)
        tokenizer = self.get_tokenizer()
        items = plain_list(messages)
        if items is None:
            raise ValueError(
                f"messages={messages!r} must be a list of messages, or a list of lists"
            )
        # a message may also be an object with attributes
        is_message = not items or isinstance(items[0], Mapping) or hasattr(items[0], "role")
        # render_chat refuses an item that is no list, and the error names its conversation
        conversations = [items] if is_message else [plain_list(each) or each for each in items]
        texts = []
        for i, conversation in enumerate(conversations):
            try:
                text = tokenizer.render_chat(
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                )
            except ValueError as error:
                raise ValueError(f"conversation {i}: {error}") from None
            texts.append(text)
        # the template's text includes every special token
        prompt_ids = tokenizer.encode_batch(texts, add_special_tokens=False)
        return self._run([*texts], prompt_ids, sampling_params, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        **vllm_keywords: Any,
    ) -> list[BeamSearchOutput]:
        """Return the `beam_width` likeliest continuations of every prompt, the best first.

        Every step is one call for all beams of all prompts. The prefix cache holds the tokens that
        beams share.

        Args:
            prompts: as for `generate`
            use_tqdm: whether to show progress, in steps
            **vllm_keywords: as for `generate`

        Raises:
            ValueError: a prompt cannot run, or `beam_width` is too large; no prompt has been
                started.
            WorkerError: a worker failed; the engine is closed.
        """
        check_keywords(LLM.beam_search, vllm_keywords)
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"params={params!r} must be BeamSearchParams")
        model_config = self.config.model_config
        ends = () if params.ignore_eos else model_config.eos_token_ids
        step_params = params.step_params(len(ends), model_config.vocab_size)
        _, prompt_ids = self._encode(as_list(prompts))
        longest = self._coordinator.max_total_tokens
        for i, ids in enumerate(prompt_ids):
            if len(ids) + params.max_tokens > longest:
                raise ValueError(
                    f"prompt {i}: max_tokens={params.max_tokens} after a prompt of {len(ids)} "
                    f"tokens is more than the {longest} tokens that a sequence may have; lower it, "
                    "or raise max_model_len and num_kv_blocks"
                )
        searches = [Beams(ids, params, ends) for ids in prompt_ids]
        for _ in tqdm(range(params.max_tokens), "Beam search", unit="step", disable=not use_tqdm):
            beams = [beam.tokens for each in searches for beam in each.running]
            if not beams:
                break
            outputs = iter(self._run([None] * len(beams), beams, step_params, use_tqdm=False))
            for each in searches:
                completions = [next(outputs).outputs[0] for _ in each.running]
                each.extend([logprobs for c in completions for logprobs in c.logprobs or ()])
        results = [each.output() for each in searches]
        if self._tokenizer is not None:
            for sequence in (each for result in results for each in result.sequences):
                hides_end = sequence.finish_reason == "stop"
                hides_end = hides_end and not params.include_stop_str_in_output
                shown = sequence.tokens[: len(sequence.tokens) - hides_end]
                sequence.text = self._tokenizer.decode(shown, skip_special_tokens=False)
        return results

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, for example between two runs of a benchmark."""
        with self._calls.turn():
            self._coordinator.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """Return counts and times of the engine since its start."""
        return self._coordinator.engine_stats()

    def profiler(self) -> Profiler:
        """Return a profiler of the engine, for benchmarks."""
        return Profiler(self._coordinator)

    @property
    def coordinator(self) -> Coordinator:
        """The engine itself, for programs that look at its processes."""
        return self._coordinator

    @property
    def worker_pids(self) -> list[int]:
        """The process id of each rank's worker, a child of this process."""
        return self._coordinator.worker_pids

    @property
    def closed(self) -> bool:
        """Whether the engine has ended."""
        return self._coordinator.closed

    # ---- ending ------------------------------------------------------------------------------

    def close(self) -> None:
        """Release processes, shared memory and GPU memory. It may be called repeatedly.

        A call that runs in another thread ends with a RuntimeError.
        """
        self._coordinator.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------

    def _encode(self, prompts: list[str | list[int]]) -> tuple[list[str | None], list[list[int]]]:
        """Return the text (None for a prompt of token ids) and the token ids of every prompt."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(self.get_tokenizer().encode_batch(texts) if texts else [])
        return (
            [prompt if isinstance(prompt, str) else None for prompt in prompts],
            [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts],
        )

    def _begin(
        self,
        texts: list[str | None],
        prompt_ids: list[list[int]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        output_kind: RequestOutputKind | None,
    ) -> AbstractContextManager[Call]:
        """Return a context manager that runs a call's requests.

        Raises:
            ValueError: a prompt can never run; the message names it by its index.
        """
        params = one_for_each(sampling_params, len(prompt_ids), self.get_default_sampling_params)
        tokenizer = self._tokenizer  # without one, `OutputProcessor` refuses bad words
        words = []
        for i, each in enumerate(params):
            try:
                words.append(tokenizer.bad_word_ids(each.bad_words) if tokenizer else [])
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
        prompts = list(zip(texts, prompt_ids, params, words, strict=True))
        return self._calls.begin(prompts, output_kind)

    def _run(
        self,
        texts: list[str | None],
        prompt_ids: list[list[int]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Run requests until they end, and return their outputs in order."""
        final_only = RequestOutputKind.FINAL_ONLY
        with (
            self._begin(texts, prompt_ids, sampling_params, final_only) as call,
            _Progress(
                total=len(prompt_ids),
                desc="Processed prompts",
                unit="prompt",
                disable=not (use_tqdm and prompt_ids),
            ) as progress,
        ):
            outputs: dict[str, RequestOutput] = {}
            ids = [request.request_id for request in call.requests]
            try:
                while len(outputs) < len(ids):
                    for output in self._calls.advance(call):
                        outputs[output.request_id] = output
                        progress.finished(output)
            except WorkerError as error:
                error.outputs = [outputs[each] for each in ids if each in outputs]
                error.unfinished = [
                    each.take() for each in call.requests if each.request_id not in outputs
                ]
                raise
            call.raise_first_error(outputs)
            return [outputs[each] for each in ids]


class _Progress(tqdm):
    """A progress bar of finished prompts, with input and output tokens per second."""

    num_input = num_output = 0

    def finished(self, output: RequestOutput) -> None:
        self.num_input += len(output.prompt_token_ids)
        self.num_output += sum([len(each.token_ids) for each in output.outputs])
        if self.disable:
            return
        seconds = max(self.format_dict["elapsed"], 1e-9)
        input_rate, output_rate = self.num_input / seconds, self.num_output / seconds
        rates = f"input {input_rate:.0f} tok/s, output {output_rate:.0f} tok/s"
        self.set_postfix_str(rates, refresh=False)
        self.update()
