"""What `LLM.generate` returns, in vLLM's shape."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation of a prompt.

    Attributes:
        index: which continuation of its request this is, from 0
        text: `token_ids` in words, special tokens left out; "" without a tokenizer
        token_ids: generated tokens, an end or stop token included
        finish_reason: "stop" at an end or stop token; "length" at `max_tokens`, `max_model_len`
            or, where that is less, what the KV cache holds; "abort" if the caller ended it; None
            while it runs
        stop_reason: the entry of `stop_token_ids` that ended it; None for anything else, the
            model's own end tokens included
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and what came of it.

    Attributes:
        request_id: unique within its engine
        prompt: the prompt's text; None if it came as token ids
        prompt_token_ids: the prompt as the model read it
        outputs: its continuations
        finished: whether all of them have ended
        num_cached_tokens: prompt tokens whose KV the prefix cache had
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
