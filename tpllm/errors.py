"""The errors a caller may want to catch, beyond ValueError and FileNotFoundError."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from tpllm.outputs import RequestOutput


class WorkerError(RuntimeError):
    """A worker process failed to start, raised, ended or stopped answering; the engine is closed.

    The message tells all of the following but the outputs, and where the crash report is.

    Attributes:
        rank: index in the TP group of the worker to blame; None if no single one is
        phase: what that worker did: "starting", "loading weights", ..., "ready" once it serves
        step: the last step that was sent to the workers; None before the first
        cause: in a few words: "RuntimeError: disk on fire", "SIGKILL", "exit code 3", "hang",
            "exit status unknown" where the program reaps its children itself
        signal: number of the signal that ended it, or None
        remote_traceback: the worker's own traceback, or its Python stack at the end; None where
            there is none, as after SIGKILL
        report: file with versions, settings, last steps and all stacks; None if none was written
        outputs: requests of the failed call that had finished
        unfinished: its other requests, with what they had produced
    """

    def __init__(
        self,
        message: str,
        rank: int | None = None,
        *,
        phase: str | None = None,
        step: int | None = None,
        cause: str | None = None,
        signal: int | None = None,
        remote_traceback: str | None = None,
        report: Path | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.step = step
        self.cause = cause
        self.signal = signal
        self.remote_traceback = remote_traceback
        self.report = report
        self.outputs: list[RequestOutput] = []
        self.unfinished: list[RequestOutput] = []


class NoNextTokenError(ValueError):
    """A request had to end before its time: its form and other settings left no next token.

    Attributes:
        outputs: of the same call, the outputs of the requests that ended as they should
        unfinished: those of the others, with what they had produced
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.outputs: list[RequestOutput] = []
        self.unfinished: list[RequestOutput] = []


class UnknownSettingError(TypeError, ValueError):
    """A keyword that does not exist.

    A TypeError as Python raises for any unknown keyword, and a ValueError as every other wrong
    setting: code that catches either goes on working.
    """


def refuse_unknown_settings(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check the keywords `given` to `owner` against those it has.

    Raises:
        UnknownSettingError: one is unknown; the message gives the nearest known name, or all.
    """
    names = list(known)
    for name in given:
        if name in names:
            continue
        near = get_close_matches(name, names, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(names))}"
        raise UnknownSettingError(f"{owner} has no setting {name!r}; {mend}")


class SettingError(ValueError):
    """A setting that only a look at the host or the device could prove wrong.

    From a worker it reaches the caller as this error, without the worker's traceback.
    """


@contextmanager
def panics_as_errors(what: str) -> Iterator[None]:
    """Turn a panic within the block into a ValueError; everything else passes.

    `pyo3_runtime.PanicException` is a BaseException, which no `except Exception` catches: one text
    that tokenizers cannot take would end a thread, or a program. Each library has a class of its
    own of that name, which cannot be imported.

    Args:
        what: the beginning of the message: what the library was asked for

    Raises:
        ValueError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
