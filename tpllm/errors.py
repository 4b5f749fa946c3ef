"""The errors that callers may want to catch, besides ValueError and FileNotFoundError."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from tpllm.outputs import RequestOutput


class WorkerError(RuntimeError):
    """A worker process failed to start, raised, ended or stopped answering; the engine is closed.

    The message holds all of the following except the outputs, and the path of the crash report.

    Attributes:
        rank: index in the TP group of the worker that failed; None if no single one did
        phase: what that worker did: "starting", "loading weights", ..., "ready" once it serves
        step: the last step that was sent to the workers; None before the first
        cause: in a few words: "RuntimeError: disk on fire", "SIGKILL", "exit code 3", "hang",
            "exit status unknown" where the program reaps its children itself
        signal: number of the signal that ended the worker, or None
        remote_traceback: the worker's own traceback, or its Python stack at the end; None where
            there is none, such as after SIGKILL
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
    """A request ended early: its structured output and other settings left no next token.

    Attributes:
        outputs: outputs of the requests of the same call that finished
        unfinished: outputs of its other requests, with what they had produced
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.outputs: list[RequestOutput] = []
        self.unfinished: list[RequestOutput] = []


class UnknownSettingError(TypeError, ValueError):
    """A keyword does not exist.

    It is a TypeError, as Python raises for any unknown keyword, and a ValueError, as tpllm raises
    for any other wrong setting. Code that catches either continues to work.
    """


def refuse_unknown_settings(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check the keywords `given` to `owner` against the `known` ones.

    Raises:
        UnknownSettingError: one is unknown; the message has the nearest known name, or all names.
    """
    names = list(known)
    for name in given:
        if name in names:
            continue
        near = get_close_matches(name, names, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(names))}"
        raise UnknownSettingError(f"{owner} has no setting {name!r}; {mend}")


class SettingError(ValueError):
    """A setting does not fit the host or the device; a worker found out.

    The caller receives it as this error, without the worker's traceback.
    """


@contextmanager
def panics_as_errors(what: str) -> Iterator[None]:
    """Turn a panic of a Rust library within the block into a ValueError; other errors pass.

    `pyo3_runtime.PanicException` is a BaseException, which `except Exception` does not catch. One
    text that tokenizers cannot encode would end a thread, or the program. Each library has its own
    class of that name, and none can be imported.

    Args:
        what: the beginning of the message: what the library did

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
    """Return the first line of an error's message, or the name of its class if that is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
