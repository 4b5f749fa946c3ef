"""Ties a worker's life to the coordinator's: no orphan survives it, however it dies."""

import ctypes
import os
import signal

from tpllm.channel.ring import wait_readable

_PR_SET_PDEATHSIG = 1


def tie_to_coordinator(coordinator_pidfd: int) -> None:
    """Have the kernel kill this process as soon as the coordinator is gone.

    SIGKILL, since anything gentler waits for the interpreter: while a library is loaded from a cold
    disk, or a call into the driver hangs, that may take minutes, and a stopped process takes no
    other signal at all. The engine's directory is therefore removed by a process of its own
    (`tpllm.engine.guard`).

    SIGINT gets its default action back: sent to this rank alone, it ends it as any signal does.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if wait_readable(coordinator_pidfd, 0.0):  # it ended before we could ask
        os._exit(1)
