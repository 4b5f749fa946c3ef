"""Tests that the error and the report of a hang or crash name each rank's step and stack."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import process_state, wait_until
from tests.supervision.stub_worker import HANG, READY, SERVE, Acts, start, until_ready
from tpllm.channel.progress import Board
from tpllm.channel.step_plan import RESULT, STEP
from tpllm.errors import WorkerError
from tpllm.supervision.child import Child
from tpllm.supervision.crash_report import NUM_KEPT, write_report
from tpllm.supervision.diagnosis import RankState, main_stack, rank_to_blame
from tpllm.supervision.launcher import WorkerGroup
from tpllm.supervision.local_host import LocalHost
from tpllm.supervision.watch import NUM_FIRST_STEPS, Timeouts

pytestmark = pytest.mark.usefixtures("fault_workers")

SAY = ["say", "loading weights"]


def begin(acts: Acts, world_size: int = 2) -> WorkerGroup:
    return start(acts, world_size, "fault_worker")


def board_of(group: WorkerGroup) -> Board:
    (host,) = group._hosts
    assert isinstance(host, LocalHost)
    return host._board


def hang_in_step(acts: list[list[Any]]) -> WorkerGroup:
    """Return two ranks in step 1, where rank 1 performs the act."""
    group = until_ready(begin({1: [READY, ["serve", 1], ["take"], *acts]}))
    group.phases[:] = ["ready"] * 2
    group.send(STEP, [b"plan"], step=0)
    group.receive(0, RESULT)
    group.send(STEP, [b"plan"], step=1)
    board = board_of(group)
    assert wait_until(lambda: board.begun(0) == board.begun(1) == 1)
    group.watch.timeouts = Timeouts(0.05, 0.05)
    return group


def test_a_stopped_rank_is_reported_with_the_stacks_of_all():
    group = hang_in_step([["stop"]])
    assert wait_until(lambda: process_state(group.pids[1]) == "T")
    with pytest.raises(WorkerError) as raised:
        group.receive(0, RESULT)
    message = str(raised.value)
    assert message.startswith("worker rank 1 hangs in step 1: none answered for start_timeout_s=")
    assert "rank 0 has begun step 1 and is " in message
    assert "in between_begin_and_end" in message
    assert "rank 1 has begun step 1 and is stopped by a signal" in message
    assert "in act_stop" in message  # it was continued only to write its stack
    assert "act_stop" in (raised.value.remote_traceback or "")


def test_a_rank_in_native_code_still_writes_its_stack():
    group = hang_in_step([["seize_interpreter"]])
    with pytest.raises(WorkerError, match="in act_seize_interpreter") as raised:
        group.receive(0, RESULT)
    assert raised.value.cause == "hang"


def test_ranks_that_all_wait_in_the_same_step_are_blamed_together():
    group = until_ready(begin({0: [READY, ["take"], HANG], 1: [READY, ["take"], HANG]}))
    group.phases[:] = ["ready"] * 2
    group.send(STEP, [b"plan"], step=0)
    board = board_of(group)
    assert wait_until(lambda: board.begun(0) == board.begun(1) == 0)
    group.watch.timeouts = Timeouts(0.05, 0.05)
    with pytest.raises(WorkerError, match="^the workers hang in step 0") as raised:
        group.receive(0, RESULT)
    assert raised.value.rank is None


def test_the_first_steps_have_the_time_of_the_start():
    group = until_ready(begin({}, 1))
    names = []
    for step in range(NUM_FIRST_STEPS + 1):
        names.append(group.watch.timeout_name)
        group.send(STEP, [b"plan"], step=step)
        group.receive(0, RESULT)
    group.close()
    assert set(names[:-1]) == {"start_timeout_s"}
    assert names[-1] == "step_timeout_s"


def test_a_slow_start_that_makes_progress_is_no_hang(monkeypatch):
    """Loading sends no message for longer than the timeout, but its beats show progress."""
    group = begin({0: [SAY, ["beat"], HANG]}, 1)
    assert wait_until(lambda: board_of(group).beats() == 1)
    group._collect()
    group.watch._beats = 0
    group.watch.timeouts = Timeouts(0.01, 0.01)
    group.watch._active_at -= 1
    assert group.watch.remaining_s() > 0  # there was a beat
    group.watch._active_at -= 1
    assert group.watch.remaining_s() <= 0  # and none since
    group.kill()


def test_a_crash_in_native_code_gives_its_python_stack():
    group = begin({0: [SAY, ["signal_self", "SIGSEGV"]]}, 1)
    with pytest.raises(WorkerError, match=r"(?s)killed by SIGSEGV while .*in act_signal_self"):
        group.receive_control(0)


@pytest.fixture
def reports(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TPLLM_CRASH_DIR", str(tmp_path / "reports"))
    return Path(tmp_path) / "reports"


def test_a_report_holds_what_a_maintainer_needs_and_no_prompt(reports):
    group = until_ready(begin({0: [READY, ["serve", 1], ["raise", "disk on fire"]]}, 1))
    group.phases[:] = ["ready"]
    group.send(STEP, [b"the secret prompt"], step=0)
    group.receive(0, RESULT)
    with pytest.raises(WorkerError) as raised:
        group.receive(0, RESULT)
    report = raised.value.report
    assert report is not None and report.parent == reports
    assert report.stat().st_mode & 0o777 == 0o600
    assert reports.stat().st_mode & 0o777 == 0o700
    text = report.read_text()
    for part in ("disk on fire", "rank 0, pid ", "step 0: ", "tpllm 0.", "torch 2.", "Settings"):
        assert part in text
    assert "secret" not in text


def test_only_the_newest_reports_are_kept(reports):
    for _ in range(NUM_KEPT + 3):
        assert write_report("it broke", {}, [], []) is not None
    assert len(list(reports.iterdir())) == NUM_KEPT


def test_no_report_is_written_if_it_is_switched_off_or_impossible(reports, monkeypatch):
    reports.write_text("a file where the folder would be")
    assert write_report("it broke", {}, [], []) is None
    monkeypatch.setenv("TPLLM_CRASH_DIR", "")
    assert write_report("it broke", {}, [], []) is None
    group = begin({0: [["raise", "disk on fire"]]}, 1)
    with pytest.raises(WorkerError) as raised:
        until_ready(group)
    assert raised.value.report is None
    assert "crash report" not in str(raised.value)


def test_blame_falls_on_the_rank_that_is_behind():
    def ranks(*steps: tuple[int, int], stopped: int | None = None) -> list[RankState]:
        return [
            RankState(i, 1, "ready", *s, "stopped by a signal" if i == stopped else "running", "")
            for i, s in enumerate(steps)
        ]

    assert rank_to_blame(ranks((5, 5), (5, 4), (5, 5))) == 1
    assert rank_to_blame(ranks((5, 4), (5, 4))) is None
    assert rank_to_blame(ranks((5, 4), (5, 4), stopped=1)) == 1
    assert rank_to_blame(ranks((0, 0))) == 0


def test_a_process_that_nobody_has_reaped_is_ending_and_a_living_one_is_not():
    process = subprocess.Popen(["true"])
    assert wait_until(lambda: Child(process.pid).is_ending())
    process.wait()
    assert not Child(process.pid).is_ending()
    assert not Child(os.getpid()).is_ending()


def test_main_stack_returns_the_last_stack_written():
    old = 'Current thread 0x1 (most recent call first):\n  File "a", line 1 in old'
    new = 'Current thread 0x1 (most recent call first):\n  File "a", line 2 in new'
    other = 'Thread 0x2 (most recent call first):\n  File "b", line 3 in other'
    assert main_stack(f"{old}\n\n{other}\n\n{new}") == '  File "a", line 2 in new'
    assert main_stack("") == ""


def test_a_guard_asked_to_end_stays_until_the_workers_are_gone():
    group = until_ready(begin({0: [READY, SERVE]}, 1))
    guard = group._processes.guard
    assert guard is not None

    def ignores(number: int) -> bool:
        status = Path(f"/proc/{guard.pid}/status").read_text()
        ignored = int(status.split("SigIgn:")[1].split()[0], 16)
        return bool(ignored >> (number - 1) & 1)

    assert wait_until(lambda: ignores(signal.SIGHUP))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(guard.pid, number)
    assert guard.poll() is None
    group.close()
    assert guard.poll() is not None


def test_the_guard_removes_what_killed_workers_leave():
    group = until_ready(begin({0: [READY, SERVE]}, 1))
    directory, guard = group._processes.directory, group._processes.guard
    assert directory is not None and guard is not None
    (directory / "rendezvous").touch()
    os.kill(group.pids[0], signal.SIGKILL)
    assert guard.wait(60) == 0
    assert not directory.exists()
    group.kill()
