"""A line on stderr for each phase of an engine's start."""

import time
from contextlib import AbstractContextManager
from typing import Self, TextIO


class StartupProgress(AbstractContextManager["StartupProgress"]):
    """Prints each phase of the start with the seconds since the beginning.

    All ranks go through the same phases; a phase is printed when the first rank begins it.
    """

    def __init__(self, stream: TextIO, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._begin = time.perf_counter()
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        self.write("starting")
        return self

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        if exc_type is None:
            self.write("ready")

    def on_phase(self, rank: int, phase: str) -> None:
        """Print a phase that a worker begins, unless another worker has begun it before."""
        if phase not in self._seen:
            self._seen.add(phase)
            self.write(phase)

    def write(self, phase: str) -> None:
        """Write a line."""
        if not self._quiet:
            seconds = time.perf_counter() - self._begin
            print(f"tpllm: {seconds:5.1f} s  {phase}", file=self._stream, flush=True)
