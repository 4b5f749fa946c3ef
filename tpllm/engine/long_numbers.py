"""Limits numbers in JSON to 32 characters, where the schema allows the number to end.

JSON has no limit, and a weak model that has written some zeros continues until `max_tokens`. A
double needs at most 24 characters and a 64-bit integer 20.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CHARS = 32
_NUMBER = frozenset(b"0123456789+-.eE")
_QUOTE, _BACKSLASH = b'"\\'


class NumberTokens:
    """The tokens of a vocabulary that can continue a number.

    Attributes:
        texts: the bytes of each token
        mask: [num_words] uint32, a bit for each id, 1 if the token can continue a number
    """

    def __init__(self, tokenizer: "LLTokenizer") -> None:
        self.texts = [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
        self.mask = np.zeros((len(self.texts) + 31) // 32, dtype=np.uint32)
        for id_, text in enumerate(self.texts):
            if text and text[0] in _NUMBER:
                self.mask[id_ >> 5] |= np.uint32(1 << (id_ & 31))


class NumberLimit:
    """Tracks the numbers of one JSON output, and ends a number that has become too long."""

    def __init__(self, tokens: NumberTokens) -> None:
        self._tokens = tokens
        self._length = 0  # characters of the number at the end of the output
        self._in_string = self._escaped = False

    def follow(self, token_id: int) -> None:
        """Advance by one token."""
        for byte in self._tokens.texts[token_id]:
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._in_string = byte != _QUOTE
                self._escaped = byte == _BACKSLASH
            elif byte in _NUMBER:
                self._length += 1
            else:
                self._length = 0
                self._in_string = byte == _QUOTE

    def apply(self, row: np.ndarray) -> None:
        """Remove the tokens that continue a long number from a mask, if others are left.

        Args:
            row: [num_words] uint32, a bit for each token that may come next; changed in place
        """
        if self._length >= MAX_CHARS:
            others = row & ~self._tokens.mask
            if others.any():
                row[:] = others
