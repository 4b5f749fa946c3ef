"""Log-probabilities as callers read them: one dict by token id for each position."""

from collections.abc import Callable, Sequence
from typing import Any, overload

from tpllm.engine.request import PackedLogprobs, TokenLogprobs
from tpllm.outputs import Logprob

Decode = Callable[[int], str]  # returns the text of one token


def read_position(position: TokenLogprobs, decode: Decode | None) -> dict[int, Logprob]:
    """Return a position's log-probabilities by token id: the token first, then the likeliest."""
    result: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(*position, strict=True):
        if token_id not in result:
            word = None if decode is None else decode(token_id)
            result[token_id] = Logprob(logprob, rank, word)
    return result


class PromptLogprobs(Sequence[dict[int, Logprob] | None]):
    """The log-probabilities of a prompt: None for its first token, a dict for each other token.

    It reads like a list, and builds each dict when it is read. A long prompt has a million entries,
    which would block the process for a second. Its pickled and deep copies are lists.
    """

    __slots__ = ("_decode", "_packed")

    def __init__(self, packed: PackedLogprobs, decode: Decode | None) -> None:
        self._packed = packed
        self._decode = decode

    def __len__(self) -> int:
        return 1 + self._packed.num_positions

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[int, Logprob] | None]: ...
    def __getitem__(self, index: int | slice) -> Any:
        positions = range(len(self))[index]  # raises as a list would
        if isinstance(positions, range):
            return [self._read(position) for position in positions]
        return self._read(positions)

    def _read(self, position: int) -> dict[int, Logprob] | None:
        if position == 0:
            return None
        return read_position(self._packed.position(position - 1), self._decode)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | PromptLogprobs):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)
