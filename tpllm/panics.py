"""A panic of a library that is written in Rust, as an error that callers expect."""

from collections.abc import Iterator
from contextlib import contextmanager


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
