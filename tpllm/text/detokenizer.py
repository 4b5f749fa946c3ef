"""Decode token ids into text as they arrive, in whole characters.

All pieces together equal the text of decoding all tokens at once. A character may span several
tokens, so its bytes are held until it is complete. There are two implementations:

- `ByteDetokenizer` for byte-level vocabularies (GPT-2's, Qwen's): a token is a byte sequence, and
  the text is the tokens' bytes decoded as UTF-8. Most tokens are complete characters, found by one
  lookup. `DecodeStream` of `tokenizers` decodes a window again with every token: it takes four
  times as long, and fails at some broken sequences.
- `WindowDetokenizer` for all other vocabularies: decodes the newest tokens again, after the tokens
  on which their text may depend.
"""

from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Decodes one sequence of tokens, piece by piece."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens add; "" while a character is incomplete."""
        ...

    def finish(self) -> str:
        """Return the text of the held bytes, with replacement characters, at the end."""
        ...


class ByteDetokenizer:
    """Detokenizer for byte-level vocabularies.

    Args:
        pieces: the text of every shown token, or its bytes if they are not valid UTF-8 alone; other
            tokens have no text
    """

    __slots__ = ("_held", "_pieces")

    def __init__(self, pieces: Mapping[int, str | bytes]) -> None:
        self._pieces = pieces
        self._held = b""

    def feed(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._held:  # the usual case in a stream
            piece = self._pieces.get(token_ids[0], "")
            if type(piece) is str:
                return piece
        pieces = [self._pieces.get(token_id, b"") for token_id in token_ids]
        data = self._held + b"".join([p.encode() if isinstance(p, str) else p for p in pieces])
        text, num_used = utf_8_decode(data, "replace", False)
        self._held = data[num_used:]
        return text

    def finish(self) -> str:
        return self._held.decode(errors="replace")


class WindowDetokenizer:
    """Detokenizer for vocabularies in which neighbours change a token's text (SentencePiece's).

    It decodes the newest tokens after a few older ones, whose text has been returned already. The
    older ones absorb what a decoder does at the beginning of a text, such as stripping a space.
    Tokens of single bytes (`<0xE2>`) are decoded in runs, so they wait for the end of their run.

    Args:
        decode: returns the text of token ids, including special tokens
        is_shown: whether a token is part of the text
        is_byte: whether a token is a single byte
        joined: text of the tokens between which no space is put, by token id
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_shown: Callable[[int], bool],
        is_byte: Callable[[int], bool],
        joined: Mapping[int, str],
    ) -> None:
        self._decode, self._is_shown, self._is_byte = decode, is_shown, is_byte
        self._joined = joined
        self._ids: list[int] = []
        self._num_returned = 0  # leading tokens of `_ids` whose text has been returned
        self._returned_text = ""  # their text
        self._last_id = -1

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._feed(token_id) for token_id in token_ids if self._is_shown(token_id)])

    def _feed(self, token_id: int) -> str:
        follows_joined = token_id in self._joined and self._last_id in self._joined
        self._last_id = token_id
        self._ids.append(token_id)
        if self._is_byte(token_id):
            return ""
        text = self._decode(self._ids)
        # with a replacement character at its end, a character is incomplete
        text = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._advance(text)
        return self._joined[token_id] if follows_joined else text

    def _advance(self, text: str) -> str:
        """Return what `text` adds to the returned text, and drop the oldest tokens."""
        new = text[len(self._returned_text) :]
        if new:  # a token without text stays: the next one may depend on it
            self._ids = self._ids[self._num_returned :]
            self._num_returned = len(self._ids)
            self._returned_text = self._decode(self._ids)
        return new

    def finish(self) -> str:
        return self._advance(self._decode(self._ids))


def piece_of_byte_level(token: str) -> str | bytes:
    """Return a byte-level token's text, or its bytes if they are not valid UTF-8 alone.

    Byte-level vocabularies write each byte as a printable character. A token with another
    character was added later, and is its own text.
    """
    try:
        data = bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _byte_alphabet() -> dict[str, int]:
    """Map GPT-2's characters to bytes: printable Latin-1 is itself, 256 and up are the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
