"""Which tokens a request's lists rule out, to find where they have left none at all.

The workers set the logits of those tokens to minus infinity. Where all of a row are, it yields its
lowest token, which is ruled out too: that is how the coordinator sees it.
"""

from collections.abc import Sequence as Items
from typing import Self

from tpllm.sampling_params import SamplingParams


class TokenRules:
    """allowed_token_ids and bad_words of one request, and min_tokens where there is no grammar.

    Args:
        held_back: end tokens, which are ruled out before `min_tokens`
    """

    def __init__(
        self, params: SamplingParams, bad_words: Items[Items[int]], held_back: frozenset[int]
    ) -> None:
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else frozenset(allowed)
        self._held_back = held_back
        self._min_tokens = params.min_tokens
        self._words: dict[int, list[list[int]]] = {}  # what comes before their last token, by that
        for word in bad_words:
            self._words.setdefault(word[-1], []).append(list(word[:-1]))

    @classmethod
    def of(
        cls, params: SamplingParams, bad_words: Items[Items[int]], end_token_ids: frozenset[int]
    ) -> Self | None:
        """None where there always is a token left, or a grammar alone decides."""
        has_grammar = params.structured_outputs is not None
        if params.allowed_token_ids is None and not (has_grammar and bad_words):
            return None
        return cls(params, bad_words, frozenset() if has_grammar else end_token_ids)

    def exclude(self, token_id: int, tokens: Items[int], num_prompt_tokens: int) -> bool:
        """Whether the request may not have this token after `tokens`."""
        if self._allowed is not None and token_id not in self._allowed:
            return True
        num_generated = len(tokens) - num_prompt_tokens
        if token_id in self._held_back and num_generated < self._min_tokens:
            return True
        return any(
            len(before) <= num_generated and list(tokens[len(tokens) - len(before) :]) == before
            for before in self._words.get(token_id, ())
        )
