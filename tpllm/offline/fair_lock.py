"""A fair lock: threads get it in the order of their calls."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class FairLock:
    """A lock that its waiting threads get in order.

    A thread that releases and takes a plain lock in a loop can keep all others out of it. Signal
    handlers and finalizers may call any method in the middle of another one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # its lock is reentrant
        self._queue: deque[int] = deque()  # thread ids; the first one holds the lock

    @property
    def has_waiters(self) -> bool:
        """Whether a thread waits for another one."""
        return len(self._queue) > 1

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the lock, and hold it while a `with` block runs.

        Raises:
            RuntimeError: this thread already holds it or waits for it, as when a signal handler
                calls.
        """
        thread_id = threading.get_ident()
        with self._changed:
            if thread_id in self._queue:
                raise RuntimeError(
                    "this LLM is in the middle of a step in this thread, which a signal handler "
                    "has interrupted; use AsyncLLM if calls come at any time"
                )
        try:
            with self._changed:
                self._queue.append(thread_id)
                self._changed.wait_for(lambda: self._queue[0] == thread_id)
            yield
        finally:
            self._leave(thread_id)

    @contextmanager
    def try_hold(self) -> Iterator[bool]:
        """Do as `hold`, or yield False at once if another thread holds the lock."""
        thread_id = threading.get_ident()
        with self._changed:
            is_free = not self._queue
            if is_free:
                self._queue.append(thread_id)
        try:
            yield is_free
        finally:
            if is_free:
                self._leave(thread_id)

    def _leave(self, thread_id: int) -> None:
        with self._changed:
            if thread_id in self._queue:
                self._queue.remove(thread_id)
            self._changed.notify_all()
