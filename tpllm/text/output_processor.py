"""Turn the engine's tokens into outputs: text, stop strings, n continuations and deltas.

The engine only handles tokens. A request with n > 1 becomes n engine requests, which share the
blocks of their prompt in the prefix cache. A stop string ends a request here, and then its engine
request is aborted. All this runs in the caller's process, and the engine does not wait for it.
"""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple, cast

from tpllm.engine.request import AddRequest, RequestUpdate, TokenLogprobs
from tpllm.errors import NoNextTokenError
from tpllm.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from tpllm.sampling_params import RequestOutputKind, SamplingParams
from tpllm.text.detokenizer import Detokenizer
from tpllm.text.logprobs import PromptLogprobs, read_position
from tpllm.text.stop_strings import find_stop, num_undecided
from tpllm.text.tokenizer import Tokenizer


class Processed(NamedTuple):
    """The result of processing the updates of a step."""

    changed: list["Request"]  # requests with a new output or an error
    to_abort: list[str]  # ids of engine requests to abort, such as after a stop string


class OutputProcessor:
    """Tracks the requests of one engine until they end. Only one thread may use it at a time."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._numbers = count()  # of requests
        self._engine_numbers = count()
        self._completions: dict[str, _Completion] = {}  # by id of the engine request
        self._requests: dict[str, Request] = {}  # by the caller's request id

    def add(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        bad_word_ids: Sequence[list[int]] = (),
        *,
        request_id: str | None = None,
        output_kind: RequestOutputKind | None = None,
    ) -> "Request":
        """Add a request, and return it. The caller sends its `engine_requests` to the engine.

        Args:
            bad_word_ids: the result of `Tokenizer.bad_word_ids` for `params.bad_words`
            request_id: None for an unused number
            output_kind: replaces `params.output_kind`

        Raises:
            ValueError: a request with this id is still running, or stop strings or bad words are
                set without a tokenizer.
        """
        tokenizer = self._tokenizer
        if tokenizer is None and (params.stop or params.bad_words):
            name = "stop" if params.stop else "bad_words"
            raise ValueError(
                f"{name}={list(getattr(params, name))!r} needs a tokenizer, and this engine has "
                "none; set tokenizer="
            )
        if request_id is None:
            request_id = next(n for n in map(str, self._numbers) if n not in self._requests)
        elif request_id in self._requests:
            raise ValueError(f"request_id={request_id!r} is still running; use another one")
        request = Request(request_id, prompt, prompt_token_ids, params, output_kind, tokenizer)
        words = list(bad_word_ids)
        for index in range(params.n):
            engine_id = str(next(self._engine_numbers))
            completion = _Completion(request, index, params, tokenizer)
            self._completions[engine_id] = completion
            request.completions.append(completion)
            request.engine_requests.append(
                AddRequest(engine_id, prompt_token_ids, params.of_continuation(index), words)
            )
        self._requests[request_id] = request
        return request

    def process(self, updates: Iterable[RequestUpdate]) -> Processed:
        """Process the updates of an engine step."""
        changed: dict[Request, None] = {}
        to_abort: list[str] = []
        for update in updates:
            completion = self._completions.get(update.request_id)
            if completion is None:
                continue  # sampled before the engine received the abort
            request = completion.request
            if update.finish_reason == "error":
                del self._completions[update.request_id]
                to_abort += self._fail(completion, str(update.stop_reason))
                changed[request] = None
                continue
            completion.apply(update)
            if completion.finish_reason is not None:
                if update.finish_reason is None:
                    to_abort.append(update.request_id)
                del self._completions[update.request_id]
                self._note_end(request)
            if request.has_new_output:
                changed[request] = None
        return Processed(list(changed), to_abort)

    def _fail(self, completion: "_Completion", reason: str) -> list[str]:
        """End a request whose continuation has no next token; return engine ids to abort."""
        completion.end("abort")
        self._note_end(completion.request)
        request = completion.request
        request.error = NoNextTokenError(reason)
        aborted = self.abort(request.request_id)
        return [] if aborted is None else aborted[1]

    def abort(self, request_id: str) -> tuple["Request", list[str]] | None:
        """End a request. Return it, and the ids of the engine requests to abort.

        Return None if there is no such request, or if it has ended.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        to_abort = []
        for engine_request, completion in zip(
            request.engine_requests, request.completions, strict=True
        ):
            if completion.finish_reason is None:
                completion.end("abort")
                del self._completions[engine_request.request_id]
                self._note_end(request)
                to_abort.append(engine_request.request_id)
        return request, to_abort

    def drop(self, engine_ids: Iterable[str]) -> "Request | None":
        """Forget the request of these continuations, which the engine refused, and return it."""
        request = None
        for engine_id in engine_ids:
            completion = self._completions.pop(engine_id, None)
            if completion is not None:
                request = completion.request
        if request is not None:
            del self._requests[request.request_id]
        return request

    def _note_end(self, request: "Request") -> None:
        request.num_unfinished -= 1
        if request.finished:
            del self._requests[request.request_id]


class Request:
    """One request: its continuations, and the output that the caller has not taken yet."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        output_kind: RequestOutputKind | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.kind = output_kind or params.output_kind
        self.engine_requests: list[AddRequest] = []
        self.completions: list[_Completion] = []
        self.num_unfinished = params.n
        self.is_changed = False  # since `take` was called last
        self.error: NoNextTokenError | None = None  # why the request ended early
        self.num_cached_tokens = 0
        self.prompt_logprobs: PromptLogprobs | None = None
        self.decode = tokenizer.decode_one if tokenizer and params.detokenize else None

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    @property
    def has_new_output(self) -> bool:
        """Whether there is an output to take; with FINAL_ONLY, only at the end."""
        return self.is_changed and (
            self.num_unfinished == 0 or self.kind is not RequestOutputKind.FINAL_ONLY
        )

    def take(self) -> RequestOutput:
        """Return the next output, of the request's `output_kind`.

        A delta holds all updates since the last call.
        """
        self.is_changed = False
        prompt_logprobs = self.prompt_logprobs
        if self.kind is RequestOutputKind.DELTA:
            outputs = [each.delta() for each in self.completions if each.has_new_output]
            self.prompt_logprobs = None  # only the first delta has them
        else:
            outputs = [each.whole() for each in self.completions]
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.num_unfinished == 0,
            self.num_cached_tokens,
            prompt_logprobs,
        )


class _Completion:
    """One continuation: its tokens and text, and how much of them has been taken."""

    def __init__(
        self, request: Request, index: int, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.has_new_output = False
        self._num_taken = 0  # tokens of earlier deltas
        self._taken_text = ""  # text of earlier outputs; stays empty for deltas
        self._new_text = ""  # text after it
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = tokenizer.detokenizer(
                params.skip_special_tokens, params.spaces_between_special_tokens
            )
        self._stops = cast(tuple[str, ...], params.stop)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        # text that is only needed at the end is decoded at once, at half the cost
        self._decodes_at_end = request.kind is RequestOutputKind.FINAL_ONLY and not self._stops
        self._num_decoded = 0
        wants_logprobs = params.logprobs is not None
        self.logprobs: list[dict[int, Logprob]] | None = [] if wants_logprobs else None
        self.cumulative_logprob = 0.0 if wants_logprobs else None

    # ---- updates from the engine -------------------------------------------------------------

    def apply(self, update: RequestUpdate) -> None:
        """Apply an update. Set `finish_reason` if the update or a stop string ends the request."""
        self.has_new_output = self.request.is_changed = True
        self.token_ids += update.new_token_ids
        if update.num_cached_tokens and self.index == 0:
            self.request.num_cached_tokens = update.num_cached_tokens
        if update.prompt_logprobs is not None and self.request.prompt_logprobs is None:
            packed, decode = update.prompt_logprobs, self.request.decode
            self.request.prompt_logprobs = PromptLogprobs(packed, decode)
        if update.logprobs is not None:
            self._add_logprobs(update.logprobs)
        if update.finish_reason is not None:
            self.stop_reason = update.stop_reason
            self.end(cast(FinishReason, update.finish_reason))
        elif not self._decodes_at_end:
            self._decode_up_to(len(self.token_ids))

    def end(self, reason: FinishReason) -> None:
        """End the continuation. Its text leaves out the token that ended it."""
        self.has_new_output = self.request.is_changed = True
        self.finish_reason = reason
        hides_last = reason == "stop" and not self._includes_stop
        self._decode_up_to(len(self.token_ids) - hides_last)
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.finish())

    def _decode_up_to(self, num_shown: int) -> None:
        """Decode the first `num_shown` tokens; with stop strings one by one, to find the last."""
        while self._detokenizer is not None and self._num_decoded < num_shown:
            begin = self._num_decoded
            self._num_decoded = begin + 1 if self._stops else num_shown
            self._add_text(self._detokenizer.feed(self.token_ids[begin : self._num_decoded]))

    def _add_text(self, piece: str) -> None:
        """Append a piece of text, and end the continuation at a stop string.

        A stop string cannot begin in text that was taken: `_take_text` holds such text back.
        """
        num_old = len(self._new_text)
        self._new_text += piece
        if not self._stops or not piece or self._num_decoded <= self._min_tokens:
            return
        found = find_stop(self._new_text, num_old, self._stops)
        if found is not None:
            self.finish_reason = "stop"
            self.stop_reason, begin, end = found
            self._new_text = self._new_text[: end if self._includes_stop else begin]
            self._detokenizer = None
            self._drop_tokens_after(self._num_decoded)

    def _drop_tokens_after(self, num_tokens: int) -> None:
        """Drop tokens of the same update after the one that completed a stop string."""
        del self.token_ids[num_tokens:]
        if self.logprobs is not None:
            del self.logprobs[num_tokens:]
            self.cumulative_logprob = sum([next(iter(d.values())).logprob for d in self.logprobs])

    def _add_logprobs(self, positions: Sequence[TokenLogprobs]) -> None:
        if self.logprobs is None or self.cumulative_logprob is None:
            return
        decode = self.request.decode
        self.logprobs += [read_position(position, decode) for position in positions]
        self.cumulative_logprob += sum([position.logprobs[0] for position in positions])

    # ---- outputs to the caller ---------------------------------------------------------------

    def delta(self) -> CompletionOutput:
        """Return the tokens and text since the last delta."""
        begin, self._num_taken = self._num_taken, len(self.token_ids)
        return self._output(self._take_text(), self.token_ids[begin:], begin)

    def whole(self) -> CompletionOutput:
        """Return all tokens and text so far."""
        # a failed call takes outputs before the end, too
        if self._decodes_at_end and self.finish_reason is None:
            self._decode_up_to(len(self.token_ids))
        self._taken_text += self._take_text()
        return self._output(self._taken_text, self.token_ids.copy(), 0)

    def _take_text(self) -> str:
        """Return the new text, without an end that may be the beginning of a stop string."""
        text = self._new_text
        if self._stops and self.finish_reason is None:
            text = text[: len(text) - num_undecided(text, self._stops)]
        self._new_text = self._new_text[len(text) :]
        return text

    def _output(self, text: str, token_ids: list[int], first: int) -> CompletionOutput:
        self.has_new_output = False
        return CompletionOutput(
            self.index,
            text,
            token_ids,
            self.finish_reason,
            self.stop_reason,
            self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[first:],
        )
