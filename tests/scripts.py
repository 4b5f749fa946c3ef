"""Python programs that tests run, watch and kill."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from tests.leaks import worker_pids

DEADLINE_S = 60.0
ROOT = Path(__file__).parents[1]


class Script:
    """A running program and its workers. It prints lines to stdout to show its progress."""

    def __init__(self, process: subprocess.Popen[str], errors: TextIO, others: set[int]) -> None:
        self.process = process
        self._errors = errors
        self._others = others  # workers that existed before

    def wait_for(self, line: str) -> None:
        """Return once the program has printed `line`."""
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            if printed.strip() == line:
                return
        raise AssertionError(f"the program ended without printing {line!r}:\n{self.finish()}")

    def worker_pids(self) -> set[int]:
        return worker_pids().keys() - self._others

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal sends it to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, stdin: str | None = None) -> str:
        """Wait for its end and return its output, with that of its workers on stderr."""
        output, _ = self.process.communicate(stdin, timeout=DEADLINE_S)
        self._errors.seek(0)
        return output + self._errors.read()

    @property
    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)


@contextmanager
def running(code: str, *, from_stdin: bool = False) -> Iterator[Script]:
    """Run `code` as `python -c`, or as `python -`, which reads it from `finish(code)`."""
    others = set(worker_pids())
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *(["-"] if from_stdin else ["-c", code])],
            stdin=subprocess.PIPE if from_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,  # where such a program looks for modules
            start_new_session=True,  # with a process group of its own
        )
        try:
            yield Script(process, cast(TextIO, errors), others)
        finally:
            process.kill()
            process.communicate()
