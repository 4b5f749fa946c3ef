"""Log-probabilities in OpenAI's formats for completions and chat completions.

There may be many of them, so they are built and encoded piece by piece: see `json_turns`.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tpllm.outputs import Logprob
from tpllm.server.json_turns import ENTRIES_PER_TURN, LongList

# Stands for minus infinity, which JSON lacks: a token that cannot be sampled. vLLM's value.
LOWEST = -9999.0

Position = dict[int, Logprob]  # by token id: the token itself, and the likeliest tokens


class Entry(NamedTuple):
    """A token of a completion.

    Attributes:
        position: None for a prompt's first token
        offset: number of characters before the token
        text: the token's text, if `position` is None
    """

    token_id: int
    position: Position | None
    offset: int
    text: str = ""


async def completion_logprobs(entries: Iterable[Entry], num_top: int) -> dict[str, Any]:
    """Return `logprobs` of a completion's choice.

    Args:
        num_top: number of alternatives; the token itself is added to them
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        offsets.append(entry.offset)
        if len(offsets) % ENTRIES_PER_TURN == 0:
            await asyncio.sleep(0)
        if entry.position is None:
            tokens.append(entry.text)
            values.append(None)
            tops.append(None)
            continue
        own = entry.position[entry.token_id]
        tokens.append(_text(own))
        values.append(_value(own))
        top: dict[str, float] = {}
        for _, each in _likeliest(entry.position, num_top):
            top.setdefault(_text(each), _value(each))  # parts of characters have equal texts
        top.setdefault(_text(own), _value(own))
        tops.append(top)
    return {
        "tokens": LongList.of(tokens),
        "token_logprobs": LongList.of(values),
        "top_logprobs": LongList.of(tops) if num_top else None,
        "text_offset": LongList.of(offsets),
    }


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Position],
    num_top: int,
    bytes_of: Callable[[int], bytes],
) -> dict[str, Any]:
    """Return `logprobs` of a chat completion's choice.

    Args:
        bytes_of: returns the UTF-8 bytes that a token adds to a text
    """
    assert len(token_ids) == len(positions)

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        data = list(bytes_of(token_id))
        return {"token": _text(logprob), "logprob": _value(logprob), "bytes": data}

    def make(part: slice) -> list[dict[str, Any]]:
        content = []
        for token_id, position in zip(token_ids[part], positions[part], strict=True):
            top = [entry(*each) for each in _likeliest(position, num_top)]
            content.append({**entry(token_id, position[token_id]), "top_logprobs": top})
        return content

    return {"content": LongList(len(positions), make), "refusal": None}


def prompt_logprobs(positions: Sequence[Position | None]) -> LongList:
    """Return `prompt_logprobs` of an answer, vLLM's field: a dict by token id per position."""
    return LongList(len(positions), lambda part: list(map(_by_id, positions[part])))


def _by_id(position: Position | None) -> dict[str, dict[str, Any]] | None:
    if position is None:
        return None
    return {
        str(token_id): {
            "logprob": _value(entry),
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in position.items()
    }


def _likeliest(position: Position, num_top: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
    return ranked[:num_top]


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)
