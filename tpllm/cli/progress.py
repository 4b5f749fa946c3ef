"""A line on stderr for each phase of an engine's start."""

import time
from contextlib import AbstractContextManager
from typing import Self, TextIO


class StartupProgress(AbstractContextManager["StartupProgress"]):
    """Tells what the workers do until they are ready, and how long it took.

    The ranks go through the same phases side by side: the first to enter one speaks for all.
    """

    def __init__(self, stream: TextIO, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._begin = time.perf_counter()
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        self.tell("starting")
        return self

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        if exc_type is None:
            self.tell("ready")

    def on_phase(self, rank: int, phase: str) -> None:
        """A worker has begun a phase."""
        if phase not in self._told:
            self._told.add(phase)
            self.tell(phase)

    def tell(self, phase: str) -> None:
        """Write a line."""
        if not self._quiet:
            seconds = time.perf_counter() - self._begin
            print(f"tpllm: {seconds:5.1f} s  {phase}", file=self._stream, flush=True)
