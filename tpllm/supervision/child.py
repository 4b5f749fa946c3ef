"""A process that we started, and how it ended."""

import os
import signal
import threading
import time
from contextlib import suppress

# No process can end with it. A program may reap all its children, also ours (a SIGCHLD handler that
# calls waitpid(-1), or SIGCHLD ignored): the exit status is lost then. subprocess says 0 for it.
UNKNOWN_EXIT_CODE = 256
_POLL_S = 0.005


class Child:
    """A child process of this one, by its pid.

    Attributes:
        exit_code: the negative number of the signal that killed it, or its exit code; None as long
            as `poll` and `wait` have not seen its end
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        # one thread must not take the status that another one is about to read. Reentrant: a signal
        # handler may end the engine in the middle of `poll`
        self._lock = threading.RLock()

    def poll(self) -> int | None:
        """The exit code, UNKNOWN_EXIT_CODE where somebody else has read it; None while it runs."""
        with self._lock:
            if self.exit_code is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:
                    if self.exit_code is None:  # else a signal handler has just read it
                        self.exit_code = UNKNOWN_EXIT_CODE
                else:
                    if pid:
                        self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Sleep until it has ended, or the time is over; then as `poll`."""
        if timeout_s is None:
            with suppress(ChildProcessError):  # WNOWAIT leaves the status for `poll` to read
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            return self.poll()
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self.exit_code

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended just now, and was reaped by others
                os.kill(self.pid, signal.SIGKILL)
