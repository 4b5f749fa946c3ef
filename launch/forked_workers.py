"""Workers that are forked from this process: a fork takes milliseconds, a new interpreter seconds.

For tests and trials of hundreds of engines on a CPU. A forked worker runs the same entry point with
the same descriptors, environment and session, and has the same parent. It differs from a started
worker only in the modules that it has imported already. It keeps to one core, since torch's threads
do not survive a fork.
"""

import gc
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NoReturn

from tpllm.supervision import processes
from tpllm.supervision.child import Child

_exec = processes._start


def start(command: processes.Command, environment: dict[str, str], output: int) -> Any:
    """Replace `processes._start`: fork workers. The guard, no module of ours, is started."""
    (_, *options), inherited = command
    if "-m" not in options:
        return _exec(command, environment, output)
    module, fd = options[options.index("-m") + 1 :]
    return fork(lambda: _become_worker(module, fd, environment, inherited, output))


def fork(run: Callable[[], None]) -> Child:
    """Fork a child of this process, in a session of its own, that only calls `run`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads: ours hold nothing that a child needs
        pid = os.fork()
    if pid:
        return Child(pid)
    try:
        os.setsid()
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _become_worker(
    module: str, fd: str, environment: dict[str, str], inherited: Sequence[int], output: int
) -> NoReturn:
    # The copies of the parent's objects must not be collected: they would close descriptors that
    # have been reused by then.
    gc.freeze()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDWR)
    for standard, fd_of in enumerate((null, *[null if output < 0 else output] * 2)):
        os.dup2(fd_of, standard)
    sys.stdout, sys.stderr = (open(n, "w", 1, closefd=False) for n in (1, 2))  # noqa: SIM115
    kept = {0, 1, 2, *inherited}
    for each in map(int, os.listdir("/proc/self/fd")):
        if each not in kept:
            with suppress(OSError):  # the descriptor of the listing
                os.close(each)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
    sys.argv = [module, fd]
    found = find_spec(module)
    assert found is not None
    is_package = found.submodule_search_locations is not None
    worker = importlib.import_module(f"{module}.__main__" if is_package else module)
    worker.main(worker.serve)
    raise AssertionError("a worker's main never returns")
