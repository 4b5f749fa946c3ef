"""The errors a caller may want to catch, beyond ValueError and FileNotFoundError."""

from collections.abc import Iterable
from difflib import get_close_matches


class WorkerError(RuntimeError):
    """A worker process failed to start, raised, or ended; its traceback is in the message.

    Attributes:
        rank: index of the worker in the TP group; None if no single worker is to blame
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


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
    """A setting that only the worker could prove wrong, by looking at its device.

    It reaches the caller as this error, without the worker's traceback.
    """
