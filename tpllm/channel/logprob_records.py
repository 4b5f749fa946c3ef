"""Log-probabilities in a step's result: blocks of successive positions of one row."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_HEADER_WORDS = 4  # index of the row in its plan, first position, positions, ids of each


def position_words(num_logprobs: int) -> int:
    """Return the number of int32 words that one position takes.

    They are the rank of the actual token, then the ids and the float32 log-probabilities of the
    actual token and of the `num_logprobs` likeliest tokens.
    """
    return 1 + 2 * (1 + num_logprobs)


@dataclass
class LogprobBlock:
    """Log-probabilities of n successive tokens of one row, k likeliest tokens each.

    Attributes:
        index: position of the row among the plan's scheduled rows
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
    def from_words(
        cls, index: int, first_position: int, words: np.ndarray, k: int
    ) -> "LogprobBlock":
        """Read the device's layout: words [n, position_words(K)] int32, K at least `k`."""
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
        """Return a block of n positions that `put` fills."""
        return cls(
            index,
            first_position,
            np.zeros(n, dtype=np.int32),
            np.zeros((n, 1 + k), dtype=np.int32),
            np.zeros((n, 1 + k), dtype=np.float32),
        )

    def put(self, chunk: "LogprobBlock") -> None:
        """Copy a block that covers some of these positions, with the same number of tokens each."""
        begin = chunk.first_position - self.first_position
        positions = slice(begin, begin + chunk.ranks.size)
        self.ranks[positions] = chunk.ranks
        self.token_ids[positions] = chunk.token_ids
        self.logprobs[positions] = chunk.logprobs

    def record(self) -> np.ndarray:
        """Return the block as [words] int32, for `read_blocks` to read."""
        n, width = self.token_ids.shape
        header = np.array([self.index, self.first_position, n, width], dtype=np.int32)
        arrays = (self.ranks, self.token_ids, self.logprobs.view(np.int32))
        return np.concatenate([header, *(array.reshape(-1) for array in arrays)])


def read_blocks(words: np.ndarray) -> Iterator[LogprobBlock]:
    """Yield the blocks of a result's `logprobs` [words] int32, as views of it."""
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
