"""Where the tokens of a text begin, in characters of that text."""

from collections.abc import Callable

from tpllm.text.detokenizer import Detokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextOffsets:
    """Follows a text token by token.

    A token that has only a part of a character begins where this character does. One that is not
    shown begins where the next one does.

    Args:
        detokenizer: makes the text, from its beginning
        text_of: a token by itself
    """

    def __init__(self, detokenizer: Detokenizer, text_of: Callable[[int], str]) -> None:
        self._detokenizer = detokenizer
        self._text_of = text_of
        self.num_chars = 0  # of the text so far, as far as its characters are whole

    def feed(self, token_id: int) -> int:
        """The offset of the next token."""
        begin = self.num_chars
        piece = self._detokenizer.feed([token_id])
        self.num_chars += len(piece)
        own = self._text_of(token_id)
        if own and BROKEN not in own and piece.endswith(own):
            return self.num_chars - len(own)  # before it, a broken character may have come out
        return begin
