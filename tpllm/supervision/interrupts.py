"""Delays Ctrl-C until the engine's state is consistent, as between two steps."""

import signal
import threading
from contextlib import AbstractContextManager
from typing import Self


class Interrupts(AbstractContextManager["Interrupts"]):
    """Delays Python's KeyboardInterrupt until `check()`. A second Ctrl-C is not delayed.

    Python may raise a KeyboardInterrupt between any two bytecodes, also after a step has been sent
    and before it has been recorded. This class does nothing outside the main thread, where Python
    raises no KeyboardInterrupt, or if the program handles SIGINT itself.
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

    def __exit__(self, error: object, *rest: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._active = False
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise the delayed KeyboardInterrupt, if there is one."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, *signal_and_frame: object) -> None:
        if self._pending:
            raise KeyboardInterrupt
        self._pending = True
