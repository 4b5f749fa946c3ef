"""Text from token ids as they come: never half a character, in all what decoding at once gives.

A character may be spread over several tokens, so a piece is held until it is whole. Two ways:

- `ByteDetokenizer` for byte-level vocabularies (GPT-2's, Qwen's): a token is some bytes, and a text
  is the bytes of its tokens read as UTF-8. Most tokens are a text by themselves, and one look into
  a table. `tokenizers`' DecodeStream, which decodes a window again with every token, takes four
  times as long, and stops with an error at some broken sequences.
- `WindowDetokenizer` for every other kind: decodes the newest tokens again, behind those that they
  may depend on.
"""

from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """The text of one sequence of tokens, in pieces."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """What these tokens add to the text; "" while a character is not whole."""
        ...

    def finish(self) -> str:
        """The rest: what was held back, broken as it is, for no more tokens come."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies.

    Args:
        pieces: of every token that shows, its text, or its bytes where they are no text by
            themselves; other tokens give nothing
    """

    __slots__ = ("_held", "_pieces")

    def __init__(self, pieces: Mapping[int, str | bytes]) -> None:
        self._pieces = pieces
        self._held = b""

    def feed(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._held:  # as almost always while it streams
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
    """For vocabularies whose decoding looks at neighbours, such as SentencePiece's.

    Decodes from `_start`, a few tokens before those whose text has been given. The first of these
    takes what a decoder does at the beginning of a text (it strips a space, say). Pieces of single
    bytes (`<0xE2>`) are read in runs, so they wait for the end of their run.

    Args:
        decode: the text of token ids, special tokens included
        is_shown: whether a token is part of the text
        is_byte: whether a token is a piece of a single byte
        joined: text of the tokens that stand alone and get no space between two of them
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_shown: Callable[[int], bool],
        is_byte: Callable[[int], bool],
        joined: Mapping[int, str],
    ) -> None:
        self._decode, self._is_shown, self._is_byte, self._joined = (
            decode,
            is_shown,
            is_byte,
            joined,
        )
        self._ids: list[int] = []
        self._given = 0  # of these, how many have given their text
        self._given_text = ""  # theirs
        self._last_id = -1

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._feed(token_id) for token_id in token_ids if self._is_shown(token_id)])

    def _feed(self, token_id: int) -> str:
        follows_alike = token_id in self._joined and self._last_id in self._joined
        self._last_id = token_id
        self._ids.append(token_id)
        if self._is_byte(token_id):
            return ""
        text = self._give()
        return self._joined[token_id] if follows_alike else text

    def _give(self) -> str:
        text = self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._move_on(text)

    def _move_on(self, text: str) -> str:
        new = text[len(self._given_text) :]
        if new:  # a token without text stays, with those that the next one may depend on
            self._ids = self._ids[self._given :]
            self._given = len(self._ids)
            self._given_text = self._decode(self._ids)
        return new

    def finish(self) -> str:
        return self._move_on(self._decode(self._ids))


def piece_of_byte_level(token: str) -> str | bytes:
    """What a token of a byte-level vocabulary stands for: a text, or bytes that are none alone.

    Such vocabularies write a byte as a printable character. A token with a character outside this
    alphabet was added later, and stands for itself.
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
    """GPT-2's characters for bytes: printable Latin-1 is itself, the rest comes from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
