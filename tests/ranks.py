"""Runs a test function in every rank of a TP group: by default CPU processes that use Gloo.

    def partial_sums_add_up(tp: TPGroup, n: int) -> None: ...  # a module-level function, tp first

    run_ranks(partial_sums_add_up, 2, n)

Each rank is forked from a server process that has imported torch and done nothing else, since a new
interpreter would take seconds for that. A group of one runs in the test's own process.
"""

import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tpllm.parallel.group import TPGroup

DEADLINE_S = 120.0
# After one rank has failed, the others fail when its sockets close, or never.
GRACE_S = 5.0


def run_ranks(fn: Callable[..., None], world_size: int, *args: Any, device: str = "cpu") -> None:
    """Call `fn(tp, *args)` in `world_size` processes and wait for them all.

    Raises:
        AssertionError: a rank raised, died or missed the deadline; the message has its traceback.
    """
    if world_size == 1:
        fn(TPGroup.single(torch.device(device)), *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("forkserver")
        ranks: list[BaseProcess] = [
            context.Process(
                target=_run_rank, args=(Path(folder), rank, world_size, device, fn, args)
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait_for(ranks)
            failures = [_failure_of(rank, ranks[rank], Path(folder)) for rank in range(world_size)]
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
    if any(failures):
        raise AssertionError("\n".join(filter(None, failures)))


def _wait_for(ranks: list[BaseProcess]) -> None:
    """Return when all ranks ended, when the deadline is over, or soon after one has failed."""
    deadline = time.monotonic() + DEADLINE_S
    running = list(ranks)
    while running and (left_s := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left_s)
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)


def _failure_of(rank: int, process: BaseProcess, folder: Path) -> str | None:
    """Return what went wrong in a rank, or None."""
    report = _report_path(folder, rank)
    if report.exists():
        return f"rank {rank} raised\n{report.read_text()}"
    if process.is_alive():
        return f"rank {rank} was still running after {DEADLINE_S:.0f} s, or when a peer had failed"
    return f"rank {rank} ended with exit code {process.exitcode}" if process.exitcode else None


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.txt"


def _run_rank(
    folder: Path,
    rank: int,
    world_size: int,
    device_type: str,
    fn: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """Run one rank; its exception goes into a file, since a traceback may not pickle."""
    try:
        warnings.simplefilter("error")
        torch.set_num_threads(1)  # ranks share the cores
        store_path = str(folder / "store")
        device = torch.device("cpu")
        if device_type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        tp = TPGroup.connect(rank, world_size, device, store_path, DEADLINE_S)
        fn(tp, *args)
        tp.close()
    except BaseException:
        _report_path(folder, rank).write_text(traceback.format_exc())
        raise SystemExit(1) from None
