"""Log-probabilities on their way back: blocks of positions of one row, in a step's result."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_HEADER_WORDS = 4  # index of the row in its plan, first position, positions, ids of each


def position_words(num_logprobs: int) -> int:
    """Words of one position: the actual token's rank, ids and bits of the log-probabilities of it
    and of the `num_logprobs` likeliest tokens.
    """
    return 1 + 2 * (1 + num_logprobs)


@dataclass
class LogprobBlock:
    """Log-probabilities of n successive tokens of one row, k likeliest tokens each.

    Attributes:
        index: of the row among the plan's scheduled rows
        first_position: index in its sequence of the first of these tokens
        ranks: [n] int32, how likely each token is: 1 for the likeliest
        token_ids: [n, 1 + k] int32, the token itself, then the likeliest ones
        logprobs: [n, 1 + k] float32
    """

    index: int
    first_position: int
    ranks: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, index: int, first_position: int, words: np.ndarray, k: int) -> "LogprobBlock":
        """From the device's layout: words [n, position_words(K)] int32, K at least `k`."""
        width = (words.shape[1] - 1) // 2
        return cls(
            index,
            first_position,
            words[:, 0],
            words[:, 1 : 2 + k],
            words[:, 1 + width : 2 + width + k].view(np.float32),
        )

    @classmethod
    def blank(cls, index: int, first_position: int, n: int, k: int) -> "LogprobBlock":
        """Of n positions, to be filled by `put`."""
        return cls(
            index,
            first_position,
            np.zeros(n, dtype=np.int32),
            np.zeros((n, 1 + k), dtype=np.int32),
            np.zeros((n, 1 + k), dtype=np.float32),
        )

    def put(self, part: "LogprobBlock") -> None:
        """Copy another block, of some of these positions and as many likeliest tokens."""
        begin = part.first_position - self.first_position
        rows = slice(begin, begin + part.ranks.size)
        self.ranks[rows] = part.ranks
        self.token_ids[rows] = part.token_ids
        self.logprobs[rows] = part.logprobs

    def record(self) -> np.ndarray:
        n, width = self.token_ids.shape
        header = np.array([self.index, self.first_position, n, width], dtype=np.int32)
        arrays = (self.ranks, self.token_ids, self.logprobs.view(np.int32))
        return np.concatenate([header, *(array.reshape(-1) for array in arrays)])


def read_blocks(words: np.ndarray) -> Iterator[LogprobBlock]:
    """The blocks of a result's `logprobs` [words] int32, as views of it."""
    while words.size:
        index, first_position, n, width = words[:BLOCK_HEADER_WORDS].tolist()
        begin = BLOCK_HEADER_WORDS
        ids, values, end = begin + n, begin + n + n * width, begin + n + 2 * n * width
        yield LogprobBlock(
            index,
            first_position,
            words[begin:ids],
            words[ids:values].reshape(n, width),
            words[values:end].view(np.float32).reshape(n, width),
        )
        words = words[end:]
