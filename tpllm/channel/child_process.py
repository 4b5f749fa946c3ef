"""How a child process begins its life: with a spec, and tied to the process that started it.

Both kinds, the workers and the engine's own process under a server, are `python -m MODULE FD`,
where FD is an anonymous file with everything the process needs, as JSON.
"""

import ctypes
import json
import os
import signal
from typing import Any

from tpllm.channel.ring import wait_readable

_PR_SET_PDEATHSIG = 1


def write_spec(spec: dict[str, Any]) -> int:
    """The descriptor of a new anonymous file with `spec`, for a child to inherit."""
    fd = os.memfd_create("tpllm-spec", os.MFD_CLOEXEC)
    os.pwrite(fd, json.dumps(spec).encode(), 0)
    return fd


def read_spec(fd: int) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    return spec


def tie_to_parent(parent_pidfd: int) -> None:
    """Have the kernel kill this process as soon as the one that started it is gone.

    SIGKILL, since anything gentler waits for the interpreter: while a library is loaded from a cold
    disk, or a call into the driver hangs, that may take minutes, and a stopped process takes no
    other signal at all. The engine's directory is therefore removed by a process of its own
    (`tpllm.supervision.guard`).

    SIGINT gets its default action back: sent to this process alone, it ends it as any signal does.
    So does SIGCHLD: where a program ignores it, its child would lose the exit statuses of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if wait_readable(parent_pidfd, 0.0):  # it ended before we could ask
        os._exit(1)
