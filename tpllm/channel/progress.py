"""A board in anonymous shared memory where each rank notes how far it is, at no cost.

Read only when something is wrong: by whoever has waited too long, or has to tell what happened.
"""

import mmap
import os
import signal

import numpy as np

# The coordinator asks a rank for its Python stacks with this signal; see `tpllm.worker.stacks`.
STACK_SIGNAL = signal.SIGUSR2

_WORDS = 8  # int64 words of a rank: a cache line of its own
_BEGUN, _LAUNCHED, _BEATS = range(3)


def create_board(num_ranks: int) -> int:
    """The descriptor of a new board, on which no rank has begun a step."""
    fd = os.memfd_create("tpllm-board", os.MFD_CLOEXEC)
    words = np.zeros((num_ranks, _WORDS), dtype=np.int64)
    words[:, [_BEGUN, _LAUNCHED]] = -1
    os.pwrite(fd, words.tobytes(), 0)
    return fd


class Board:
    """What all ranks have noted, as the coordinator reads it."""

    def __init__(self, fd: int) -> None:
        self._words = _map(fd)

    def begun(self, rank: int) -> int:
        """The last step that `rank` has begun; -1 for none."""
        return int(self._words[rank, _BEGUN])

    def launched(self, rank: int) -> int:
        """The last step that `rank` has handed to its device (a CPU has then computed it)."""
        return int(self._words[rank, _LAUNCHED])

    def beats(self) -> int:
        """Grows while a rank does something long, such as loading weights, and gets on with it."""
        return int(self._words[:, _BEATS].sum())

    def close(self) -> None:
        """Unmap the board. No other call after it."""
        del self._words


class Progress:
    """One rank's line of the board, for that rank to write."""

    def __init__(self, fd: int, rank: int) -> None:
        self._words = _map(fd)[rank]

    def begin(self, step: int) -> None:
        self._words[_BEGUN] = step

    def launch(self, step: int) -> None:
        self._words[_LAUNCHED] = step

    def beat(self) -> None:
        self._words[_BEATS] += 1


def _map(fd: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(fd, 0), dtype=np.int64).reshape(-1, _WORDS)
