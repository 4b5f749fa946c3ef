"""JSON of answers that may be long: made a piece at a time, so that others get their turn between.

The log-probabilities of a prompt of 32k tokens are 48 MB of JSON, seconds of work.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from tpllm.server.errors import to_json

ENTRIES_PER_TURN = 32  # of 21 tokens each, some milliseconds

_MARK = secrets.token_hex(16)  # stands for a long list; nobody else can know it


@dataclass(frozen=True)
class LongList:
    """A list of an answer. `make` gives the entries of a slice."""

    num_entries: int
    make: Callable[[slice], list[Any]]

    @staticmethod
    def of(entries: list[Any]) -> "list[Any] | LongList":
        """The entries to be encoded in turns, or at once where they are few."""
        if len(entries) <= ENTRIES_PER_TURN:
            return entries
        return LongList(len(entries), entries.__getitem__)


async def to_json_in_turns(content: object) -> list[bytes]:
    """As `to_json`, for what may hold any number of `LongList`: the pieces, in order."""
    long_lists: list[LongList] = []

    def put_aside(value: object) -> str:
        assert isinstance(value, LongList), f"no JSON for {type(value).__name__}"
        long_lists.append(value)
        return _MARK

    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=put_aside)
    first, *rests = encoder.encode(content).encode().split(f'"{_MARK}"'.encode())
    pieces = [first]
    for long_list, rest in zip(long_lists, rests, strict=True):
        pieces += [piece async for piece in _encode(long_list)]
        pieces.append(rest)
    return pieces


async def _encode(long_list: LongList) -> AsyncGenerator[bytes, None]:
    yield b"["
    for begin in range(0, long_list.num_entries, ENTRIES_PER_TURN):
        if begin:
            await asyncio.sleep(0)
        entries = long_list.make(slice(begin, begin + ENTRIES_PER_TURN))
        yield (b"," if begin else b"") + to_json(entries)[1:-1].encode()
    yield b"]"
