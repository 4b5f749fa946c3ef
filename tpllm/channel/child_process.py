"""Start-up of a child process: it reads its spec and ties its life to its parent process.

A worker, the engine's process under a server and the process that tries grammars are all
`python -m MODULE FD`. FD is an anonymous file that holds everything the process needs, as JSON.
"""

import ctypes
import json
import os
import signal
import sys
from typing import Any

from tpllm.channel.ring import wait_readable

_PR_SET_PDEATHSIG = 1


def write_spec(spec: dict[str, Any]) -> int:
    """Return the descriptor of a new anonymous file that holds `spec`, for a child to inherit."""
    fd = os.memfd_create("tpllm-spec", os.MFD_CLOEXEC)
    os.pwrite(fd, json.dumps(spec).encode(), 0)
    return fd


def begin_child() -> dict[str, Any]:
    """Return this process's spec, after having the kernel kill it once its parent has ended.

    The spec holds "parent", a pidfd of the parent.

    The signal is SIGKILL. Every other signal waits for the interpreter, which may take minutes
    while it loads a library from a cold disk or a driver call hangs, and a stopped process
    receives no other signal. A separate process therefore removes the engine's directory
    (`tpllm.supervision.guard`).

    SIGINT and SIGCHLD get their default actions back. SIGINT then ends this process like any other
    signal. A child that inherits an ignored SIGCHLD would lose the exit statuses of its children.
    """
    fd = int(sys.argv[1])
    spec: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if wait_readable(spec["parent"], 0.0):  # the parent ended before prctl
        os._exit(1)
    return spec
