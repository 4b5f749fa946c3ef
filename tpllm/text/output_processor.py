"""From the engine's tokens to what callers read: text, stop strings, n continuations, deltas.

The engine knows nothing of these. A request with n > 1 is n requests to it, which share the blocks
of their prompt in its prefix cache; a stop string ends a request here, and there it is aborted. All
of it is work of the caller's process, which an engine does not wait for.
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
    """What the updates of a step came to."""

    changed: list["Request"]  # with something to take, or an error
    to_abort: list[str]  # ids that the engine is to drop: their texts have met a stop string


class OutputProcessor:
    """The requests of one engine, from `add` to their ends. For one thread at a time."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._numbers = count()  # of requests
        self._engine_numbers = count()
        self._completions: dict[str, _Completion] = {}  # by the engine's request id
        self._requests: dict[str, Request] = {}  # by the caller's

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
        """Expect updates for a new request; its `engine_requests` are for the engine.

        Args:
            bad_word_ids: `Tokenizer.bad_word_ids` of those of `params`
            request_id: None for a number that no other request has
            output_kind: instead of that of `params`

        Raises:
            ValueError: a request of this id is still running; or stop strings or bad words are
                given, and there is no tokenizer.
        """
        tokenizer = self._tokenizer
        if tokenizer is None and (params.stop or params.bad_words):
            name = "stop" if params.stop else "bad_words"
            raise ValueError(
                f"{name}={list(getattr(params, name))!r} needs a tokenizer, and this engine has "
                "none; name one with tokenizer="
            )
        if request_id is None:
            request_id = next(n for n in map(str, self._numbers) if n not in self._requests)
        elif request_id in self._requests:
            raise ValueError(f"request_id={request_id!r} is still running; take another one")
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
        """Take in what a step of the engine brought."""
        changed: dict[Request, None] = {}
        to_abort: list[str] = []
        for update in updates:
            completion = self._completions.get(update.request_id)
            if completion is None:
                continue  # drawn before the engine heard that it had ended
            request = completion.request
            if update.finish_reason == "error":
                del self._completions[update.request_id]
                to_abort += self._fail(completion, str(update.stop_reason))
                changed[request] = None
                continue
            completion.take_in(update)
            if completion.finish_reason is not None:
                if update.finish_reason is None:
                    to_abort.append(update.request_id)
                del self._completions[update.request_id]
                self._note_end(request)
            if request.has_news:
                changed[request] = None
        return Processed(list(changed), to_abort)

    def _fail(self, completion: "_Completion", reason: str) -> list[str]:
        """End a request whose continuation has no next token; the ids for the engine to drop."""
        completion.end("abort")
        self._note_end(completion.request)
        request = completion.request
        request.error = NoNextTokenError(reason)
        aborted = self.abort(request.request_id)
        return [] if aborted is None else aborted[1]

    def abort(self, request_id: str) -> tuple["Request", list[str]] | None:
        """End a request here and now: the request, and the ids for the engine to drop.

        None if there is no such request, as after its end.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        dropped = []
        for engine_request, completion in zip(
            request.engine_requests, request.completions, strict=True
        ):
            if completion.finish_reason is None:
                completion.end("abort")
                del self._completions[engine_request.request_id]
                self._note_end(request)
                dropped.append(engine_request.request_id)
        return request, dropped

    def drop(self, engine_ids: Iterable[str]) -> "Request | None":
        """Forget the request that these continuations belong to: it was never begun."""
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
    """One request: its continuations, and what of them the caller has not taken yet."""

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
        self.is_changed = False  # since it was taken last
        self.error: NoNextTokenError | None = None  # why it ended before its time
        self.num_cached_tokens = 0
        self.prompt_logprobs: PromptLogprobs | None = None
        self.decode = tokenizer.decode_one if tokenizer and params.detokenize else None

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    @property
    def has_news(self) -> bool:
        """Whether there is something to take: at the end alone, if that is what was asked for."""
        return self.is_changed and (
            self.num_unfinished == 0 or self.kind is not RequestOutputKind.FINAL_ONLY
        )

    def take(self) -> RequestOutput:
        """What there is to tell, in the form that the request asks for.

        Where several updates came in since, a delta holds them all.
        """
        self.is_changed = False
        prompt_logprobs = self.prompt_logprobs
        if self.kind is RequestOutputKind.DELTA:
            outputs = [each.delta() for each in self.completions if each.has_news]
            self.prompt_logprobs = None  # has been told
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

    __slots__ = (
        "_detokenizer",
        "_fresh",
        "_includes_stop",
        "_min_tokens",
        "_num_read",
        "_num_taken",
        "_reads_at_end",
        "_stops",
        "_taken",
        "cumulative_logprob",
        "finish_reason",
        "has_news",
        "index",
        "logprobs",
        "request",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self, request: Request, index: int, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.has_news = False
        self._num_taken = 0  # tokens
        self._taken = ""  # text; stays empty for deltas
        self._fresh = ""  # text after it
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = tokenizer.detokenizer(
                params.skip_special_tokens, params.spaces_between_special_tokens
            )
        self._stops = cast(tuple[str, ...], params.stop)
        self._includes_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        # where nobody sees the text before the end, it is made in one go, at half the cost
        self._reads_at_end = request.kind is RequestOutputKind.FINAL_ONLY and not self._stops
        self._num_read = 0  # tokens whose text has been made
        wants_logprobs = params.logprobs is not None
        self.logprobs: list[dict[int, Logprob]] | None = [] if wants_logprobs else None
        self.cumulative_logprob = 0.0 if wants_logprobs else None

    # ---- what comes in -----------------------------------------------------------------------

    def take_in(self, update: RequestUpdate) -> None:
        """Note an update; `finish_reason` is set where it, or a stop string, is the end."""
        self.has_news = self.request.is_changed = True
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
        elif not self._reads_at_end:
            self._read_on(len(self.token_ids))

    def end(self, reason: FinishReason) -> None:
        """No more tokens come. The token that ends a text is not part of it."""
        self.has_news = self.request.is_changed = True
        self.finish_reason = reason
        hides_last = reason == "stop" and not self._includes_stop
        self._read_on(len(self.token_ids) - hides_last)
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.finish())

    def _read_on(self, num_shown: int) -> None:
        """Make text of the tokens up to `num_shown`: one by one where one may be the last."""
        while self._detokenizer is not None and self._num_read < num_shown:
            begin = self._num_read
            self._num_read = begin + 1 if self._stops else num_shown
            self._add_text(self._detokenizer.feed(self.token_ids[begin : self._num_read]))

    def _add_text(self, piece: str) -> None:
        """Add to the text, which ends where it meets a stop string.

        What was taken cannot be the beginning of one: it is not given out before that is certain.
        """
        num_old = len(self._fresh)
        self._fresh += piece
        if not self._stops or not piece or self._num_read <= self._min_tokens:
            return
        found = find_stop(self._fresh, num_old, self._stops)
        if found is not None:
            self.finish_reason = "stop"
            self.stop_reason, begin, end = found
            self._fresh = self._fresh[: end if self._includes_stop else begin]
            self._detokenizer = None
            self._drop_tokens_after(self._num_read)

    def _drop_tokens_after(self, num_tokens: int) -> None:
        """Tokens that came in the same update, beyond the one that completed a stop string."""
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

    # ---- what goes out -----------------------------------------------------------------------

    def delta(self) -> CompletionOutput:
        """What is new since the last one."""
        begin, self._num_taken = self._num_taken, len(self.token_ids)
        return self._output(self._take_text(), self.token_ids[begin:], begin)

    def whole(self) -> CompletionOutput:
        """Everything so far."""
        if (
            self._reads_at_end and self.finish_reason is None
        ):  # asked for before the end all the same
            self._read_on(len(self.token_ids))
        self._taken += self._take_text()
        return self._output(self._taken, self.token_ids.copy(), 0)

    def _take_text(self) -> str:
        """The text that is certain to be in the output."""
        text = self._fresh
        if self._stops and self.finish_reason is None:
            text = text[: len(text) - num_undecided(text, self._stops)]
        self._fresh = self._fresh[len(text) :]
        return text

    def _output(self, text: str, token_ids: list[int], first: int) -> CompletionOutput:
        self.has_news = False
        return CompletionOutput(
            self.index,
            text,
            token_ids,
            self.finish_reason,
            self.stop_reason,
            self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[first:],
        )
