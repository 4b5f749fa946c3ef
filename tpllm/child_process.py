"""How a child process begins its life: with a spec, and tied to the process that started it.

Both kinds, the workers and the engine's own process under a server, are `python -m MODULE FD`,
where FD is an anonymous file with everything the process needs, as JSON.
"""

import ctypes
import json
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1


def write_spec(spec: dict[str, Any]) -> int:
    """The descriptor of a new anonymous file with `spec`, for a child to inherit."""
    fd = os.memfd_create("tpllm-spec", os.MFD_CLOEXEC)
    os.pwrite(fd, json.dumps(spec).encode(), 0)
    return fd


def read_spec(fd: int) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    return spec


def tie_to_parent(parent_pidfd: int, clean_up: Callable[[], None]) -> None:
    """End this process, after `clean_up`, as soon as the one that started it is gone.

    Two ties, for either alone has a hole: the kernel's parent-death signal interrupts any system
    call but reaches Python only between two bytecodes; a thread that sleeps on a pidfd of the
    parent needs no bytecode of the main thread. The pidfd also covers a parent that died before the
    signal was asked for.
    """

    def leave() -> None:
        clean_up()
        os._exit(1)  # no destructors: they could wait for processes that are gone

    def on_signal(signum: int, frame: FrameType | None) -> None:
        clean_up()
        # die of the signal: somebody may have sent it to this process alone, which its parent then
        # can tell
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)

    def watch() -> None:
        poll = select.poll()
        poll.register(parent_pidfd, select.POLLIN)
        poll.poll()
        leave()

    signal.signal(signal.SIGTERM, on_signal)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    threading.Thread(target=watch, name="tpllm-lifeline", daemon=True).start()
