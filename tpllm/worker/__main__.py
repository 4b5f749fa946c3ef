"""The entry of a worker process: `python -m tpllm.worker FD`, started by the launcher alone.

FD is an anonymous file with everything it needs, as JSON. The order below matters: first the tie to
the coordinator, so that no later failure can leave this process behind, then the channel, so that
every later failure can be told, and only then torch, which takes seconds to import.
"""

import os
import stat
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tpllm.channel.child_process import read_spec, tie_to_parent
from tpllm.channel.progress import Progress
from tpllm.channel.ring import RingDescriptors, RingReader, RingWriter
from tpllm.errors import SettingError
from tpllm.worker.replies import Replies
from tpllm.worker.stacks import answer_with_stacks

Spec = dict[str, Any]
Serve = Callable[[Spec, RingReader, Replies], None]


def serve(spec: Spec, plans: RingReader, replies: Replies) -> None:
    """The life of a rank, until the coordinator ends it."""
    replies.phase("importing torch")
    # On a CPU torch's threads spin at the end of every operation before they sleep. Where other
    # processes want the cores, that makes a step 30 times slower (5 -> 150 ms); 5,000 turns are
    # some microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    from tpllm.worker.worker import Worker

    progress = Progress(spec["board"], spec["rank"])
    Worker(spec, plans, replies, progress).run()


def main(serve: Serve = serve) -> NoReturn:
    """Join the engine and `serve` in it; tests serve something smaller."""
    spec = read_spec(int(sys.argv[1]))
    tie_to_parent(spec["coordinator"])
    os.set_inheritable(spec["lifeline"], False)  # a compiler that we start is no worker
    answer_with_stacks(spec["stacks"])
    exit_code = 1
    try:
        replies = Replies(RingWriter(RingDescriptors.of(spec["replies"])))
        plans = RingReader(RingDescriptors.of(spec["plans"]), spec["rank"])
        exit_code = _serve_and_tell(serve, spec, plans, replies)
    except BaseException:
        traceback.print_exc()  # there is no channel to tell it through
    # At once: peers wait for this rank in collectives, threads wait for nothing; and the driver
    # frees the GPU faster than destructors do, and waits for no peer.
    os._exit(exit_code)


def _serve_and_tell(serve: Serve, spec: Spec, plans: RingReader, replies: Replies) -> int:
    """Returns the exit code, after telling the coordinator what went wrong."""
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
    """Make the engine's private directory, unless another rank has made it.

    Raises:
        SettingError: there is no room for it, or no permission, or it is somebody else's.
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
