"""The outputs that callers receive. Names and meanings are vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class Logprob(NamedTuple):
    """The log-probability of a token at one position.

    Attributes:
        logprob: natural logarithm of its probability
        rank: 1 for the likeliest token of the vocabulary
        decoded_token: the text of this token alone; None without a tokenizer
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


# Slots, and not frozen: a stream creates one of each per token, and this takes a third the time.
@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation of a prompt.

    Attributes:
        index: number of the continuation within its request, from 0
        text: the text of `token_ids`, without the end token or stop string that ended it (unless
            `include_stop_str_in_output`); "" without a tokenizer or with `detokenize=False`
        token_ids: generated tokens, including an end token or stop token
        finish_reason: "stop" at an end token, stop token or stop string; "length" at `max_tokens`,
            at `max_model_len`, or when the sequence fills the KV cache; "abort" if the caller
            ended it, or if it is part of an error; None while it runs
        stop_reason: the entry of `stop_token_ids` or `stop` that ended it; None otherwise, also
            at the model's own end tokens
        cumulative_logprob: sum of the log-probabilities of all tokens so far; None without
            `logprobs`
        logprobs: for each of `token_ids` a dict by token id: the token's own log-probability
            first, then the likeliest tokens; None without `logprobs`
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
    """The output of a request: everything so far, or what is new (see `output_kind`).

    Attributes:
        request_id: unique within its engine
        prompt: the prompt's text; None if the prompt is token ids
        prompt_token_ids: the prompt's token ids, as the model reads them
        outputs: the `n` continuations; a delta holds only those with new tokens
        finished: whether all continuations have ended
        num_cached_tokens: prompt tokens whose KV was in the prefix cache
        prompt_logprobs: an entry for each prompt token, as in `CompletionOutput.logprobs`, None
            for the first; None without `prompt_logprobs`. Entries are built when they are read
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None = None
