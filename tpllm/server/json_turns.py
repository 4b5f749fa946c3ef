"""Encode long answers as JSON piece by piece, so that other tasks run in between.

The log-probabilities of a prompt of 32k tokens are 48 MB of JSON, and take seconds to encode.
"""

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpllm.server.errors import to_json

ENTRIES_PER_TURN = 32  # of 21 tokens each: a few milliseconds

_MARK = secrets.token_hex(16)  # placeholder of a long list, which no text can contain by guessing


@dataclass(frozen=True)
class LongList:
    """A long list in an answer. `make` returns the entries of a slice."""

    num_entries: int
    make: Callable[[slice], list[Any]]

    @staticmethod
    def of(entries: list[Any]) -> "list[Any] | LongList":
        """Return a LongList of the entries, or the list itself if it is short."""
        if len(entries) <= ENTRIES_PER_TURN:
            return entries
        return LongList(len(entries), entries.__getitem__)


async def to_json_in_turns(content: object) -> list[bytes]:
    """Encode content that may hold `LongList` objects; return the pieces of JSON in order."""
    long_lists: list[LongList] = []

    def put_aside(value: object) -> str:
        assert isinstance(value, LongList), f"no JSON for {type(value).__name__}"
        long_lists.append(value)
        return _MARK

    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=put_aside)
    first, *rests = encoder.encode(content).encode().split(f'"{_MARK}"'.encode())
    pieces = [first]
    for long_list, rest in zip(long_lists, rests, strict=True):
        pieces[-1] += b"["
        for begin in range(0, long_list.num_entries, ENTRIES_PER_TURN):
            if begin:
                await asyncio.sleep(0)
            entries = to_json(long_list.make(slice(begin, begin + ENTRIES_PER_TURN)))
            pieces.append((b"," if begin else b"") + entries[1:-1].encode())
        pieces.append(b"]" + rest)
    return pieces
