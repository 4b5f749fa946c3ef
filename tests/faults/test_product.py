"""Tests of every fault in every phase of every rank, at TP 1, 2 and 4, without torch.

The launcher, the channel and the start of a worker are the real ones. A fixture in
tests/conftest.py checks after each test that nothing is left behind.
"""

from typing import Any, NamedTuple

import pytest

from tests.leaks import process_state, wait_until
from tests.supervision.socket_host import start_on_two_hosts
from tests.supervision.stub_worker import READY, SERVE, Acts, start, until_ready
from tpllm.channel.step_plan import RESULT, STEP
from tpllm.errors import WorkerError
from tpllm.supervision.launcher import StartHosts, WorkerGroup
from tpllm.supervision.local_host import start_local_host
from tpllm.supervision.watch import Timeouts

pytestmark = pytest.mark.usefixtures("fault_workers")


class Fault(NamedTuple):
    act: list[Any]
    cause: str  # the attribute of WorkerError


FAULTS = {
    "killed": Fault(["signal_self", "SIGKILL"], "SIGKILL"),
    "crashed": Fault(["signal_self", "SIGSEGV"], "SIGSEGV"),
    "raises": Fault(["raise", "disk on fire"], "RuntimeError: disk on fire"),
    "leaves": Fault(["exit", 3], "exit code 3"),
    "stopped": Fault(["stop"], "hang"),
}
START = ["starting", "joining the group", "loading weights", "capturing graphs"]
SAYINGS = [["say", phase] for phase in START[1:]]
# What a rank does before the fault, and how many results have come by then.
PHASES: dict[str, tuple[list[list[Any]], int]] = {
    **{phase: (SAYINGS[:i], 0) for i, phase in enumerate(START)},
    "first step": ([*SAYINGS, READY, ["take"]], 0),
    "later step": ([*SAYINGS, READY, ["serve", 2], ["take"]], 2),
    "idle": ([*SAYINGS, READY, ["serve", 2]], 2),
    "closing": ([*SAYINGS, READY, ["serve", 2], ["take"]], 2),
}
RANKS: list[tuple[int, int, StartHosts]] = [
    (rank, size, start_local_host) for size in (1, 2, 4) for rank in range(size)
]
RANKS += [(rank, 4, start_on_two_hosts) for rank in (1, 3)]  # behind an agent, and here


@pytest.mark.parametrize("rank, world_size, start_hosts", RANKS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_with_rank_phase_and_cause(
    fault, phase, rank, world_size, start_hosts, tmp_path
):
    before, num_steps = PHASES[phase]
    is_idle = tmp_path / "is idle"
    if phase == "idle":
        before = [*before, ["await", str(is_idle)]]
    acts: Acts = {each: [*SAYINGS, READY, SERVE] for each in range(world_size)}
    acts[rank] = [*before, FAULTS[fault].act, SERVE]
    group = start(acts, world_size, "fault_worker", start_hosts=start_hosts)
    if phase == "closing":
        until_ready(group)
        run_steps(group, num_steps)
        group.close()  # raises nothing: the engine is closed in any case
        assert group.closed
        return
    with pytest.raises(WorkerError) as raised:
        reach_the_fault(group, phase, num_steps)
        is_idle.touch()
        if fault == "stopped":
            assert wait_until(lambda: process_state(group.pids[rank]) == "T")
            group.watch.timeouts = Timeouts(0.05, 0.05)
        group.receive(0, RESULT)
    error = raised.value
    assert (error.rank, error.cause) == (rank, FAULTS[fault].cause)
    assert error.phase == (phase if phase in START else "ready")
    in_flight = phase.endswith("step")
    assert error.step == (num_steps - 1 + in_flight if num_steps or in_flight else None)
    moment = f"in step {num_steps}" if in_flight else f"while idle after step {num_steps - 1}"
    assert (f"while {phase}" if phase in START else moment) in str(error)
    assert error.report is not None and str(error.report) in str(error)
    assert group.closed


def reach_the_fault(group: WorkerGroup, phase: str, num_steps: int) -> None:
    """Run what precedes the fault, then trigger it."""
    if phase in START:
        return
    until_ready(group)
    group.phases[:] = ["ready"] * group.world_size
    run_steps(group, num_steps)
    if phase.endswith("step"):
        group.send(STEP, [b"plan"], step=num_steps)


def run_steps(group: WorkerGroup, count: int) -> None:
    for step in range(count):
        group.send(STEP, [b"plan"], step=step)
        group.receive(0, RESULT)
