"""Log-probabilities in OpenAI's two shapes: of completions, and of chat completions.

There may be any number of them. What takes long is made in turns: see `json_turns`.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from tpllm.outputs import Logprob
from tpllm.server.json_turns import ENTRIES_PER_TURN, LongList

# What JSON has for a token that cannot be drawn: it knows no infinity. vLLM's value.
LOWEST = -9999.0

Position = dict[int, Logprob]  # by token id: the token itself, and the likeliest


async def completion_logprobs(
    token_ids: Iterable[int],
    positions: Iterable[Position | None],
    num_top: int,
    text_offset: int,
    first_text: str = "",
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion's choice, and the letters of the text after its last token.

    Args:
        positions: one for each token; None for a prompt's first, which nothing precedes
        num_top: how many alternatives were asked for; the token itself comes on top of them
        text_offset: letters of the text before the first token
        first_text: of a prompt's first token, which has no entry that tells it
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        offsets.append(text_offset)
        if len(offsets) % ENTRIES_PER_TURN == 0:
            await asyncio.sleep(0)
        if position is None:
            tokens.append(first_text)
            values.append(None)
            tops.append(None)
            text_offset += len(first_text)
            continue
        own = position[token_id]
        tokens.append(_text(own))
        values.append(_value(own))
        top = {_text(each): _value(each) for each in _likeliest(position, num_top)}
        top.setdefault(_text(own), _value(own))
        tops.append(top)
        text_offset += len(_text(own))
    content = {
        "tokens": LongList.of(tokens),
        "token_logprobs": LongList.of(values),
        "top_logprobs": LongList.of(tops) if num_top else None,
        "text_offset": LongList.of(offsets),
    }
    return content, text_offset


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[Position], num_top: int
) -> dict[str, Any]:
    """`logprobs` of a chat completion's choice."""
    assert len(token_ids) == len(positions)

    def make(part: slice) -> list[dict[str, Any]]:
        content = []
        for token_id, position in zip(token_ids[part], positions[part], strict=True):
            top = [_chat_entry(each) for each in _likeliest(position, num_top)]
            content.append({**_chat_entry(position[token_id]), "top_logprobs": top})
        return content

    return {"content": LongList(len(positions), make), "refusal": None}


def prompt_logprobs(positions: Sequence[Position | None]) -> LongList:
    """`prompt_logprobs` of an answer: vLLM's field, by token id."""
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


def _likeliest(position: Position, num_top: int) -> list[Logprob]:
    ranked = sorted(position.values(), key=lambda entry: entry.rank or 0)
    return ranked[:num_top]


def _chat_entry(entry: Logprob) -> dict[str, Any]:
    text = _text(entry)
    # a token of incomplete UTF-8 decodes to a replacement mark: its bytes are not known then
    data = None if "�" in text else list(text.encode())
    return {"token": text, "logprob": _value(entry), "bytes": data}


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)
