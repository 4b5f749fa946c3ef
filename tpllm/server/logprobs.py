"""Log-probabilities in OpenAI's two shapes: of completions, and of chat completions."""

from collections.abc import Sequence
from typing import Any

from tpllm.outputs import Logprob

# What JSON has for a token that cannot be drawn: it knows no infinity. vLLM's value.
LOWEST = -9999.0

Position = dict[int, Logprob]  # by token id: the token itself, and the likeliest


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Position | None],
    num_top: int,
    text_offset: int,
    first_text: str = "",
) -> dict[str, Any]:
    """`logprobs` of a completion's choice.

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
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops if num_top else None,
        "text_offset": offsets,
    }


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[Position], num_top: int
) -> dict[str, Any]:
    """`logprobs` of a chat completion's choice."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = [_chat_entry(each) for each in _likeliest(position, num_top)]
        content.append({**_chat_entry(position[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(
    positions: Sequence[Position | None],
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` of an answer: vLLM's field, by token id."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": _value(entry),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]


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
