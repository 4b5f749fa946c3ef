"""A fair lock: threads get it in the order in which they ask."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One thread at a time has the turn, the one that asked first.

    A plain lock would go back to the thread that has just let go of it: one that gives it back and
    asks again in a loop would keep all others out. Signal handlers and finalizers may call any
    method in the middle of another.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # its lock is reentrant
        self._line: deque[int] = deque()  # of thread ids; the first one has the turn

    @property
    def is_awaited(self) -> bool:
        """Whether a thread waits for the turn of another."""
        return len(self._line) > 1

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn, and have it for the length of a block.

        Raises:
            RuntimeError: this thread has the turn, or waits for it: a signal handler calls.
        """
        me = threading.get_ident()
        with self._changed:
            if me in self._line:
                raise RuntimeError(
                    "this LLM is in the middle of a step in this very thread, which a signal "
                    "handler has interrupted; use AsyncLLM where calls come at any time"
                )
        try:
            with self._changed:
                self._line.append(me)
                self._changed.wait_for(lambda: self._line[0] == me)
            yield
        finally:
            self._leave(me)

    @contextmanager
    def try_take(self) -> Iterator[bool]:
        """As `take`, but without waiting; gives False where somebody else has the turn."""
        me = threading.get_ident()
        with self._changed:
            is_free = not self._line
            if is_free:
                self._line.append(me)
        try:
            yield is_free
        finally:
            if is_free:
                self._leave(me)

    def _leave(self, me: int) -> None:
        with self._changed:
            if me in self._line:
                self._line.remove(me)
            self._changed.notify_all()
