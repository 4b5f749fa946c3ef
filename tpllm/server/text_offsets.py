"""Compute the character offsets of tokens in their text."""

from collections.abc import Callable

from tpllm.text.detokenizer import Detokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextOffsets:
    """Computes the offset of each token of a growing text.

    A token that holds a part of a character has the offset of that character. A token that is not
    shown has the offset of the next token.

    Args:
        detokenizer: decodes the text from its beginning
        text_of: returns the text of one token
    """

    def __init__(self, detokenizer: Detokenizer, text_of: Callable[[int], str]) -> None:
        self._detokenizer = detokenizer
        self._text_of = text_of
        self.num_chars = 0  # complete characters of the text so far

    def feed(self, token_id: int) -> int:
        """Add the next token, and return its offset."""
        begin = self.num_chars
        piece = self._detokenizer.feed([token_id])
        self.num_chars += len(piece)
        own = self._text_of(token_id)
        if own and BROKEN not in own and piece.endswith(own):
            return self.num_chars - len(own)  # the piece may begin with a replacement character
        return begin
