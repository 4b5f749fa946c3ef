"""Ties a worker's life to the coordinator's: no orphan survives it, however it dies."""

import ctypes
import os
import select
import shutil
import signal
import threading
from types import FrameType

_PR_SET_PDEATHSIG = 1


def tie_to_coordinator(coordinator_pidfd: int, directory: str) -> None:
    """End this process, and remove the engine's `directory`, as soon as the coordinator is gone.

    Two ties, for either alone has a hole: the kernel's parent-death signal interrupts any system
    call but reaches Python only between two bytecodes; a thread that sleeps on a pidfd of the
    coordinator needs no bytecode of the main thread. The pidfd also covers a coordinator that died
    before the signal was asked for. Every worker removes the directory, so the last one does.
    """

    def leave() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)  # no destructors: they could wait for ranks that are gone

    def on_signal(signum: int, frame: FrameType | None) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        # die of the signal: somebody may have sent it to this rank alone, which the coordinator
        # then can tell
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)

    def watch() -> None:
        poll = select.poll()
        poll.register(coordinator_pidfd, select.POLLIN)
        poll.poll()
        leave()

    signal.signal(signal.SIGTERM, on_signal)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    threading.Thread(target=watch, name="tpllm-lifeline", daemon=True).start()
