"""Ctrl-C at a time of our choosing: between two steps, never in the middle of the books."""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Self


class Interrupts(AbstractContextManager["Interrupts"]):
    """Holds Python's KeyboardInterrupt back until `check()`; the second Ctrl-C is not held back.

    A KeyboardInterrupt may be raised between any two bytecodes, so also after a step has been sent
    and before it has been noted. Does nothing outside the main thread, where Python delivers none,
    or where the program handles SIGINT itself.
    """

    def __init__(self) -> None:
        self._pending = False
        self._active = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._active = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._active = False
        if exc is None:
            self.check()

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if there was one."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._pending:
            raise KeyboardInterrupt
        self._pending = True
