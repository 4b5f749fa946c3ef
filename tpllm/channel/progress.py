"""A board in anonymous shared memory on which each rank records its progress, at no cost.

The coordinator reads it when a worker takes too long, and for a crash report.
"""

import mmap
import os
import signal

import numpy as np

# A rank writes its Python stacks when it receives this signal; see `tpllm.worker.__main__`.
STACK_SIGNAL = signal.SIGUSR2

_WORDS = 8  # int64 words per rank: one cache line
_BEGUN, _LAUNCHED, _BEATS = range(3)


def create_board(num_ranks: int) -> int:
    """Return the descriptor of a new board, on which no rank has begun a step."""
    fd = os.memfd_create("tpllm-board", os.MFD_CLOEXEC)
    words = np.zeros((num_ranks, _WORDS), dtype=np.int64)
    words[:, [_BEGUN, _LAUNCHED]] = -1
    os.pwrite(fd, words.tobytes(), 0)
    return fd


class Board:
    """The progress of all ranks, as the coordinator reads it."""

    def __init__(self, fd: int) -> None:
        self._words = _map(fd)

    def begun(self, rank: int) -> int:
        """Return the last step that `rank` has begun; -1 if it has begun none."""
        return int(self._words[rank, _BEGUN])

    def launched(self, rank: int) -> int:
        """Return the last step that `rank` has launched on its device (a CPU has computed it)."""
        return int(self._words[rank, _LAUNCHED])

    def beats(self) -> int:
        """Return a counter that grows while a rank makes progress, as when it loads weights."""
        return int(self._words[:, _BEATS].sum())

    def close(self) -> None:
        """Unmap the board. No other method may be called afterwards."""
        del self._words


class Progress:
    """One rank's line of the board, which that rank writes."""

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
