"""Which tokens a request's lists exclude. The coordinator detects with it that no token is left.

The workers set the logits of excluded tokens to minus infinity. If all tokens of a row are
excluded, the row yields its lowest token id, which is then an excluded token.
"""

from collections.abc import Sequence as Items
from typing import Self

from tpllm.sampling_params import SamplingParams


class TokenRules:
    """The tokens that allowed_token_ids, bad_words and min_tokens of one request exclude.

    Args:
        params: the request's sampling parameters
        bad_words: the token ids of each bad word
        held_back: end tokens that are excluded until `min_tokens` tokens have been generated
    """

    def __init__(
        self, params: SamplingParams, bad_words: Items[Items[int]], held_back: frozenset[int]
    ) -> None:
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else frozenset(allowed)
        self._held_back = held_back
        self._min_tokens = params.min_tokens
        self._words: dict[int, list[list[int]]] = {}  # last token of a bad word -> tokens before it
        for word in bad_words:
            self._words.setdefault(word[-1], []).append(list(word[:-1]))

    @classmethod
    def from_params(
        cls, params: SamplingParams, bad_words: Items[Items[int]], end_token_ids: frozenset[int]
    ) -> Self | None:
        """Return the rules of a request, or None if they can never exclude all tokens."""
        has_grammar = params.structured_outputs is not None
        if params.allowed_token_ids is None and not (has_grammar and bad_words):
            return None
        return cls(params, bad_words, frozenset() if has_grammar else end_token_ids)

    def excludes(self, token_id: int, tokens: Items[int], num_prompt_tokens: int) -> bool:
        """Whether this token is excluded after `tokens`, which begin with the prompt."""
        if self._allowed is not None and token_id not in self._allowed:
            return True
        num_generated = len(tokens) - num_prompt_tokens
        if token_id in self._held_back and num_generated < self._min_tokens:
            return True
        return any(
            len(before) <= num_generated and list(tokens[len(tokens) - len(before) :]) == before
            for before in self._words.get(token_id, ())
        )
