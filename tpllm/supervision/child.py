"""A child process and how it ended."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

# No process ends with this code. It stands for a lost exit status: a program that reaps all child
# processes (a SIGCHLD handler with waitpid(-1), or SIGCHLD ignored) also reaps those of an engine.
# subprocess would report 0.
UNKNOWN_EXIT_CODE = 256
_POLL_S = 0.005
_PF_EXITING = 4  # a flag of a process, see proc_pid_stat(5)


class Child:
    """A child process of this process.

    Attributes:
        exit_code: its exit code, or the negative number of the signal that killed it; None until
            `poll` or `wait` finds that it has ended
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        # one thread must not reap the child while another one waits for it. Reentrant, since a
        # signal handler may end the engine during `poll`
        self._lock = threading.RLock()

    def poll(self) -> int | None:
        """Return the exit code, UNKNOWN_EXIT_CODE if it is lost, or None while the child runs."""
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
        """Sleep until the child has ended or the timeout is over; return as `poll` does."""
        if timeout_s is None:
            with suppress(ChildProcessError):  # WNOWAIT leaves the status for `poll` to read
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            return self.poll()
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self.exit_code

    def is_ending(self) -> bool:
        """Whether the kernel is ending the process, whose exit code is known only afterwards."""
        letter, flags = kernel_state(self.pid)
        return letter == "Z" or bool(flags & _PF_EXITING)

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process. One that a debugger stops does not count."""
        return kernel_state(self.pid)[0] == "T"

    def kill(self) -> None:
        """Send SIGKILL, unless the child has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended, and other code reaped it
                os.kill(self.pid, signal.SIGKILL)


def how_it_ended(exit_code: int) -> tuple[str, str]:
    """Return an exit code in words, and the usual reason of such an exit."""
    if exit_code == UNKNOWN_EXIT_CODE:
        return "ended (exit status unknown)", (
            "this program reaps its child processes itself (SIGCHLD), which loses the status; "
            "see the last lines on stderr, or dmesg"
        )
    if exit_code >= 0:
        how = f"ended with exit code {exit_code}"
        return how, "see its last lines on stderr"
    number = -exit_code
    if number == signal.SIGKILL:
        reason = "the host may be out of memory: see dmesg, lower max_num_seqs or num_kv_blocks"
    elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        reason = "native code crashed: see the process's last lines on stderr"
    else:
        reason = "another process sent the signal"
    return f"was killed by {signal_name(number)}", reason


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"


def kernel_state(pid: int) -> tuple[str, int]:
    """Return the kernel's letter for a process's state, "X" if it has ended, and its flags."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", 0
    fields = text.rpartition(") ")[2].split()
    return fields[0], int(fields[6])
