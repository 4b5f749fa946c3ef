"""The entry point of a worker process, `python -m tpllm.worker FD`; only the launcher starts it.

FD is an anonymous file that holds the worker's specification as JSON. The order below matters. The
process first ties itself to the coordinator, so that no later failure leaves it behind. Then it
opens the channel, so that it can report every later failure. Only then it imports torch, which
takes seconds.
"""

import faulthandler
import os
import stat
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tpllm.channel.child_process import begin_child
from tpllm.channel.progress import STACK_SIGNAL, Progress
from tpllm.channel.ring import RingDescriptors, RingReader, RingWriter
from tpllm.errors import SettingError
from tpllm.worker.replies import Replies

Spec = dict[str, Any]
Serve = Callable[[Spec, RingReader, Replies], None]


def serve(spec: Spec, plans: RingReader, replies: Replies) -> None:
    """Run a rank until the coordinator shuts it down."""
    replies.phase("importing torch")
    # On a CPU, torch's threads spin after every operation before they sleep. If other processes
    # need the cores, a step becomes 30 times slower (5 -> 150 ms). 5,000 spins take microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    from tpllm.worker.worker import Worker

    progress = Progress(spec["board"], spec["local_rank"])
    Worker(spec, plans, replies, progress).run()


def main(serve: Serve = serve) -> NoReturn:
    """Join the engine and run `serve`; tests pass a smaller `serve`."""
    spec = begin_child()
    os.set_inheritable(spec["lifeline"], False)  # a compiler that torch starts is no worker
    # All threads' stacks, written on a crash and when the coordinator requests them. The handler is
    # written in C: it needs neither the interpreter's lock nor a responsive main thread. It writes
    # files, lines and names of functions, but no values.
    faulthandler.enable(file=spec["stacks"])
    faulthandler.register(STACK_SIGNAL, file=spec["stacks"])
    exit_code = 1
    try:
        replies = Replies(RingWriter(RingDescriptors.from_list(spec["replies"])))
        plans = RingReader(RingDescriptors.from_list(spec["plans"]), spec["local_rank"])
        exit_code = _serve_and_report(serve, spec, plans, replies)
    except BaseException:
        traceback.print_exc()  # no channel to report it through
    # Exit without cleanup: peers wait for this rank in collectives, and the driver frees the GPU
    # faster than destructors do, without waiting for a peer.
    os._exit(exit_code)


def _serve_and_report(serve: Serve, spec: Spec, plans: RingReader, replies: Replies) -> int:
    """Run `serve`, report its failure to the coordinator, and return the exit code."""
    try:
        _make_directory(spec["directory"])
        serve(spec, plans, replies)
    except SettingError as error:
        replies.error(str(error), setting=True)
        return 1
    except BaseException:
        replies.error(traceback.format_exc())
        return 1
    return 0


def _make_directory(directory: str) -> None:
    """Create the engine's private directory, unless another rank has created it.

    Raises:
        SettingError: it cannot be created, or it belongs to another user.
    """
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"TMPDIR={os.path.dirname(directory)!r} takes no directory ({error.strerror}), and "
            "the workers meet in one; make room there, or set TMPDIR to another folder"
        ) from None
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SettingError(f"{directory} is not a private directory of this user; set TMPDIR")


if __name__ == "__main__":
    main()
