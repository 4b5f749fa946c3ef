"""The entry of a worker process: `python -m tpllm.worker FD`, started by the launcher alone.

FD is an anonymous file with everything it needs, as JSON. The order below matters: first the
engine's directory and the tie to the coordinator, so that no later failure can leave either behind,
then the channel, so that every later failure can be told, and only then torch, which takes seconds
to import.
"""

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tpllm.channel.ring import RingDescriptors, RingReader, RingWriter
from tpllm.child_process import read_spec, tie_to_parent
from tpllm.errors import SettingError
from tpllm.worker.replies import Replies

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

    rank, world_size = spec["rank"], spec["world_size"]
    Worker(rank, world_size, spec["directory"], spec["settings"], plans, replies).run()


def main(serve: Serve = serve) -> NoReturn:
    """Join the engine and `serve` in it; tests serve something smaller."""
    spec = read_spec(int(sys.argv[1]))
    os.makedirs(spec["directory"], mode=0o700, exist_ok=True)
    # every worker removes the directory, so the last one does
    tie_to_parent(spec["coordinator"], lambda: _remove(spec["directory"]))
    exit_code = 1
    try:
        replies = Replies(RingWriter(_descriptors(spec["replies"])))
        plans = RingReader(_descriptors(spec["plans"]), spec["rank"])
        exit_code = _serve_and_tell(serve, spec, plans, replies)
    except BaseException:
        traceback.print_exc()  # there is no channel to tell it through
    # the coordinator removes it as well, unless it is killed while it waits for us
    _remove(spec["directory"])
    # At once: peers wait for this rank in collectives, threads wait for nothing; and the driver
    # frees the GPU faster than destructors do, and waits for no peer.
    os._exit(exit_code)


def _serve_and_tell(serve: Serve, spec: Spec, plans: RingReader, replies: Replies) -> int:
    """Returns the exit code, after telling the coordinator what went wrong."""
    try:
        serve(spec, plans, replies)
    except SettingError as error:
        replies.error(str(error), setting=True)
        return 1
    except BaseException:
        replies.error(traceback.format_exc())
        return 1
    return 0


def _remove(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def _descriptors(ring: list[Any]) -> RingDescriptors:
    memory, ready, freed = ring
    return RingDescriptors(memory, tuple(ready), freed)


if __name__ == "__main__":
    main()
