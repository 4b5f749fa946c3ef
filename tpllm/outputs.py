"""What callers get back, in vLLM's shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class Logprob(NamedTuple):
    """How likely the model found a token at one position.

    Attributes:
        logprob: natural logarithm of its probability
        rank: 1 for the likeliest token of all
        decoded_token: the token by itself in words; None without a tokenizer
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


# Not frozen, with slots: a stream makes one of each for every token, and this is a third the time.
@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation of a prompt.

    Attributes:
        index: which continuation of its request this is, from 0
        text: `token_ids` in words, without the end token or stop text that ended it (unless
            `include_stop_str_in_output`); "" without a tokenizer or with `detokenize=False`
        token_ids: generated tokens, an end or stop token included
        finish_reason: "stop" at an end token, stop token or stop text; "length" at `max_tokens`,
            `max_model_len` or, where that is less, what the KV cache holds; "abort" if the caller
            ended it, or it is part of an error; None while it runs
        stop_reason: the entry of `stop_token_ids` or `stop` that ended it; None for anything else,
            the model's own end tokens included
        cumulative_logprob: sum over all tokens so far; None unless `logprobs` are asked for
        logprobs: for each of `token_ids`, its own log-probability first and then those of the
            likeliest tokens, by token id; None unless asked for
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and what came of it: everything so far, or what is new (see `output_kind`).

    Attributes:
        request_id: unique within its engine
        prompt: the prompt's text; None if it came as token ids
        prompt_token_ids: the prompt as the model read it
        outputs: its continuations, `n` of them; a delta holds those that have news
        finished: whether all of them have ended
        num_cached_tokens: prompt tokens whose KV the prefix cache had
        prompt_logprobs: for each token of the prompt, as `CompletionOutput.logprobs`, the first
            excepted; None unless asked for. Each entry is made when it is read
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
