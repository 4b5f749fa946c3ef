"""Tests of the launcher with workers that need no torch: how they start, fail and end.

A fixture in tests/conftest.py checks after each test that nothing is left behind.
test_launcher_programs.py tests the end of the whole program.
"""

import gc
import os
import resource
import signal
import sys
import threading
from contextlib import closing
from typing import Any

import pytest

from launch import forked_workers
from tests.ctrl_c import is_interrupted
from tests.forked_engines import engines_are_started
from tests.leaks import is_running, wait_until
from tests.supervision import stub_worker
from tests.supervision.stub_worker import HANG, READY, SERVE, start, until_ready
from tpllm.channel import ring
from tpllm.channel.step_plan import RESULT, STEP
from tpllm.errors import SettingError, WorkerError
from tpllm.supervision import child, failure, interrupts, launcher, local_host, processes
from tpllm.supervision.child import Child
from tpllm.supervision.launcher import WorkerGroup
from tpllm.supervision.watch import Timeouts

pytestmark = pytest.mark.usefixtures("stub_workers", "ctrl_c_raises")

LONG_S = 60.0
MODULES = (launcher, local_host, processes, child, ring, interrupts)


@pytest.fixture(autouse=True)
def forked(stub_workers, monkeypatch):
    """Fork workers: starting an interpreter would take most of a test's time."""
    monkeypatch.setitem(sys.modules, "stub_worker", stub_worker)
    monkeypatch.setattr(processes, "_start", forked_workers.start)


@pytest.fixture
def started(forked):
    """Start workers as new processes, as a user's engine does."""
    with engines_are_started():
        yield


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Do not wait for a second cause if the test has none."""
    monkeypatch.setattr(failure, "GRACE_S", 0.05)


@pytest.fixture
def patience(impatience, monkeypatch):
    """Wait for the cause of a failure without a limit."""
    monkeypatch.setattr(failure, "GRACE_S", LONG_S)


def run_steps(group: WorkerGroup, count: int = 1) -> None:
    """Run steps one after the other; the workers return the plan as the result."""
    for i in range(count):
        group.send(STEP, [str(i).encode()], step=group.watch.step + 1)
        assert group.receive(0, RESULT).payload.tobytes() == str(i).encode()


# ---- working -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("started")
def test_records_reach_every_worker_and_answers_come_back():
    with closing(until_ready(start(world_size=3))) as group:
        run_steps(group, 100)
        group.send_control({"type": "question"})
        for rank in (2, 0, 1):  # in the requested order, whatever their order of arrival
            answer = group.receive_control(rank)
            assert answer == {"rank": rank, "heard": {"type": "question"}}


def test_phases_are_reported_as_they_come():
    heard: list[tuple[int, str]] = []
    say: list[list[Any]] = [["say", "loading weights"], ["say", "capturing graphs"], READY, SERVE]
    with closing(start({0: say}, 1, on_phase=lambda *said: heard.append(said))) as group:
        group.receive_control(0)
        assert heard == [(0, "loading weights"), (0, "capturing graphs")]
        assert group.phases == ["capturing graphs"]


def test_a_result_that_came_before_a_failure_is_not_lost():
    acts: dict[int, list[list[Any]]] = {0: [READY, ["serve", 1], ["raise", "disk on fire"]]}
    with closing(until_ready(start(acts, world_size=1))) as group:
        group.send(STEP, [b"0"], step=0)
        (pid,) = group.pids
        wait_until(
            lambda: not is_running(pid)
        )  # by now both the result and the error report have come
        assert group.receive(0, RESULT).payload.tobytes() == b"0"
        with pytest.raises(WorkerError, match="disk on fire"):
            group.receive(0, RESULT)


@pytest.mark.usefixtures("started")
def test_workers_outlive_the_thread_that_made_them():
    groups: list[WorkerGroup] = []
    thread = threading.Thread(target=lambda: groups.append(until_ready(start())))
    thread.start()
    thread.join()
    with closing(groups.pop()) as group:
        run_steps(group, 10)


@pytest.mark.usefixtures("started")
def test_a_worker_gets_its_spec_and_nothing_else_by_descriptors():
    pipe = os.pipe()
    for fd in pipe:
        os.set_inheritable(fd, True)  # inheritable, but no worker may get it
    with closing(until_ready(start())) as group:
        group.send_control({"type": "look around"})
        views = [group.receive_control(rank) for rank in range(2)]
        directory = group._processes.directory
    for fd in pipe:
        os.close(fd)
    for view in views:
        assert len(view["argv"]) == 2
        assert view["argv"][1].isdigit()
        changed = dict(view["environ"].items() - os.environ.items())
        assert changed.pop("TMPDIR") == str(directory)
        # Python itself may set LC_CTYPE
        assert changed.keys() <= {"PYTHONPATH", "CUDA_DEVICE_ORDER", "LC_CTYPE"}
        opened = {int(fd): target for fd, target in view["opened"].items() if target}
        assert opened.pop(0) == "/dev/null"
        assert opened.pop(1) == opened.pop(2) == os.readlink("/proc/self/fd/2")
        kinds = [target.split(" ")[0] for target in opened.values()]
        # two rings, each mapped, with an eventfd per reader and one back; the spec; our pidfd; the
        # board, mapped; a file for stacks; the end of a pipe that is closed when the worker ends
        assert kinds.count("/memfd:tpllm-ring") == 4
        assert kinds.count("/memfd:tpllm-spec") == 1
        assert kinds.count("anon_inode:[eventfd]") == 2 + 1 + 1 + 1
        assert kinds.count("/memfd:tpllm-board") == 2
        assert kinds.count("/memfd:tpllm-stacks") == 1
        assert sum(kind.startswith("pipe:") for kind in kinds) == 1
        assert len(kinds) == 4 + 1 + 5 + 1 + 2 + 1 + 1


def test_the_directory_is_private():
    with closing(until_ready(start())) as group:  # the workers create it
        assert group._processes.directory is not None
        assert group._processes.directory.stat().st_mode & 0o777 == 0o700


def test_signal_handlers_that_return_disturb_nothing():
    """A signal may interrupt every system call, and the program's own handlers run then."""
    caught = []
    done = threading.Event()

    def pester() -> None:
        while not done.wait(0.001):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    thread = threading.Thread(target=pester)
    thread.start()
    try:
        with closing(until_ready(start())) as group:
            run_steps(group, 300)
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert caught


# ---- failing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phases, when",
    [
        ([], "while starting"),
        ([["say", "loading weights"]], "while loading weights"),
        ([["say", "loading weights"], ["say", "capturing graphs"]], "while capturing graphs"),
    ],
)
def test_an_exception_while_starting_gives_rank_phase_and_traceback(phases, when):
    group = start({1: [*phases, ["raise", "disk on fire"]]})
    with pytest.raises(WorkerError, match=f"worker rank 1 failed {when}:") as raised:
        until_ready(group)
    assert raised.value.rank == 1
    for part in ("Traceback (most recent", "in act_raise", "RuntimeError: disk on fire"):
        assert part in str(raised.value)
    assert group.closed


def test_an_exception_in_a_step_gives_rank_step_and_traceback():
    fails: list[list[Any]] = [READY, ["serve", 3], ["raise", "disk on fire"]]
    group = until_ready(start({0: [READY, ["serve", 2], HANG], 1: fails}))
    group.phases[:] = ["ready"] * 2
    with pytest.raises(WorkerError, match=r"(?s)rank 1 failed in step 2:.*disk on fire"):
        run_steps(group, 3)
    assert group.closed


def test_a_long_traceback_keeps_its_end():
    group = start({0: [["raise", "x" * 10**6 + " the cause"]]}, world_size=1)
    with pytest.raises(WorkerError, match="the cause\nA crash report is in "):
        until_ready(group)


@pytest.mark.usefixtures("started")
def test_a_worker_that_cannot_even_start_is_reported(capfd):
    group = start(module="no_such_worker")
    with pytest.raises(WorkerError, match="rank . ended with exit code 1 while starting"):
        until_ready(group)
    assert "No module named no_such_worker" in capfd.readouterr().err


def test_a_worker_that_ends_without_an_error_report_is_reported():
    group = start({1: [["exit", 3]]})
    with pytest.raises(WorkerError, match="rank 1 ended with exit code 3 while starting") as raised:
        until_ready(group)
    assert raised.value.rank == 1


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_worker_killed_while_idle_is_reported_by_rank_and_signal(name):
    group = until_ready(start())
    group.phases[:] = ["ready"] * 2
    run_steps(group, 2)
    os.kill(group.pids[1], signal.Signals[name])
    expected = f"worker rank 1 was killed by {name} while idle after step 1;"
    with pytest.raises(WorkerError, match=expected) as raised:
        group.receive(0, RESULT)
    assert raised.value.rank == 1
    assert group.closed


def test_a_worker_killed_in_a_step_is_reported_by_rank_and_step():
    group = start({1: [READY, ["serve", 3], ["signal_self", "SIGKILL"]]})
    until_ready(group).phases[:] = ["ready"] * 2
    with pytest.raises(WorkerError, match=r"rank 1 was killed by SIGKILL .* step 2; .*memory"):
        run_steps(group, 3)
        group.receive(0, RESULT)


@pytest.mark.parametrize(
    "end, said",
    [
        (["signal_self", "SIGKILL"], "worker rank 1 was killed by SIGKILL"),
        (["exit", 3], "worker rank 1 ended with exit code 3"),
    ],
)
def test_a_rank_that_just_ended_causes_the_error_reports_of_others(patience, tmp_path, end, said):
    reported = str(tmp_path / "reported")
    reports_error = [["complain", "connection closed by peer"], ["touch", reported], HANG]
    group = start({0: reports_error, 1: [["await", reported], end]})
    with pytest.raises(WorkerError, match=f"(?s)^{said}.*connection closed by peer") as raised:
        group.receive(0, RESULT)
    assert raised.value.rank == 1


def test_the_first_of_several_error_reports_is_the_cause(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    acts = {
        0: [["await", str(first)], ["complain", "peer lost"], ["touch", str(second)], HANG],
        1: [["complain", "disk on fire"], ["touch", str(first)], HANG],
    }
    group = start(acts)
    assert wait_until(second.exists)  # both have sent their report before anything is received
    with pytest.raises(
        WorkerError, match=r"^worker rank 1 failed .*\n.*disk on fire\nA crash"
    ) as raised:
        group.receive_control(0)
    assert raised.value.rank == 1


def test_an_error_report_is_the_cause_of_the_abort_of_another_rank(patience, tmp_path):
    reported = str(tmp_path / "reported")
    acts = {
        0: [["await", reported], ["signal_self", "SIGABRT"]],
        1: [["complain", "disk on fire"], ["touch", reported], HANG],
    }
    with pytest.raises(WorkerError, match=r"(?s)^worker rank 1.*fire.*rank 0 .* SIGABRT") as raised:
        until_ready(start(acts))
    assert raised.value.rank == 1


def test_an_abort_is_reported_after_the_exit_that_caused_it(tmp_path):
    reported = tmp_path / "reported"
    group = start({0: [["signal_self", "SIGABRT"]], 1: [["await", str(reported)], ["exit", 3]]})
    assert wait_until(lambda: not is_running(group.pids[0]))
    reported.touch()
    assert wait_until(
        lambda: not is_running(group.pids[1])
    )  # both have ended before anything is received
    with pytest.raises(WorkerError, match=r"(?s)^worker rank 1 ended with.*rank 0 .* SIGABRT"):
        group.receive_control(0)


def test_a_rank_that_is_ending_is_waited_for_before_another_is_blamed(monkeypatch, tmp_path):
    """On a GPU, peers report errors while the driver still frees the memory of a dead rank."""
    end = tmp_path / "end"
    group = start(
        {0: [["complain", "peer lost"], HANG], 1: [["await", str(end)], ["signal_self", "SIGKILL"]]}
    )

    def is_ending(child: Child) -> bool:
        end.touch()
        return child.pid == group.pids[1]

    monkeypatch.setattr(Child, "is_ending", is_ending)
    monkeypatch.setattr(failure, "GRACE_S", -1.0)  # wait for no other rank
    monkeypatch.setattr(failure, "ENDING_S", LONG_S)
    with pytest.raises(WorkerError, match=r"(?s)^worker rank 1 was killed by SIGKILL.*peer lost"):
        group.receive_control(0)


def test_a_setting_that_a_worker_refuses_is_a_value_error():
    group = start({1: [["say", "measuring memory"], ["refuse", "lower max_num_seqs=9"]]})
    with pytest.raises(ValueError, match=r"^lower max_num_seqs=9$") as raised:
        until_ready(group)
    assert type(raised.value) is SettingError
    assert group.closed


def test_sending_to_dead_workers_reports_them():
    group = until_ready(start({0: [READY, HANG], 1: [READY, HANG]}))
    os.kill(group.pids[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 0 was killed by SIGKILL"):
        for _ in range(100):  # more than the ring holds
            group.send(STEP, [b"plan"])


def test_sending_to_workers_that_hang_times_out():
    group = until_ready(start({1: [READY, HANG]}))
    group.watch.timeouts = Timeouts(0.1, 0.1)
    with pytest.raises(WorkerError, match=r"rank 1 hangs .*none took a record for") as raised:
        for _ in range(100):
            group.send(STEP, [b"plan"])
    assert raised.value.rank == 1
    assert group.closed


@pytest.mark.usefixtures("started")
def test_running_out_of_descriptors_at_any_point_of_the_start(nothing_left, monkeypatch):
    monkeypatch.setattr(local_host, "refuse_too_few_descriptors", lambda world_size: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    messages = []
    for limit in range(3, 200):  # no descriptor may have this number, or a larger one
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            group = start()
        except OSError as error:
            messages.append(str(error))
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        nothing_left()
    group.kill()
    assert len(messages) > 20
    assert all("Too many open files" in message for message in messages)


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("started")
def test_ctrl_c_at_any_line_of_the_start_leaves_nothing(nothing_left):
    started: list[WorkerGroup] = []
    line = 1
    while is_interrupted(lambda: started.append(start(world_size=1)), line, MODULES):
        nothing_left()
        line += 1
    assert line > 100
    started.pop().kill()


@pytest.mark.usefixtures("started")
def test_ctrl_c_at_any_line_of_the_end_leaves_an_engine_that_can_be_ended(nothing_left):
    line = 1
    while is_interrupted((group := start(world_size=1)).kill, line, MODULES):
        group.kill()
        nothing_left()
        line += 1
    assert line > 10


# ---- ending --------------------------------------------------------------------------------------


def test_closing_lets_the_workers_end_by_themselves():
    group = until_ready(start())
    processes = group._processes.processes
    group.close()
    assert [process.exit_code for process in processes] == [0, 0]
    group.close()
    group.kill()
    assert group.closed
    for call in (lambda: group.send(STEP, [b"plan"]), lambda: group.receive(0, RESULT)):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            call()


def test_closing_kills_a_worker_that_ignores_the_shutdown(monkeypatch):
    monkeypatch.setattr(launcher, "CLOSE_TIMEOUT_S", 0.1)
    group = until_ready(start({1: [READY, HANG]}))
    processes = group._processes.processes
    group.close()
    assert processes[1].exit_code == -signal.SIGKILL


def test_a_group_without_references_is_collected(nothing_left):
    group = until_ready(start())
    run_steps(group)
    gc.disable()  # no cycle may keep it
    try:
        del group
        nothing_left()
    finally:
        gc.enable()


def test_closing_from_another_thread_ends_a_call_that_waits(tmp_path):
    is_in_step = tmp_path / "is in step"
    group = until_ready(start({0: [READY, ["serve", 1], ["touch", str(is_in_step)], HANG]}))

    def close_then() -> None:
        assert wait_until(is_in_step.exists)
        group.close()

    closing_it = threading.Thread(target=close_then)
    closing_it.start()
    with pytest.raises(RuntimeError, match="this engine is closed") as raised:
        run_steps(group)  # may be closed before its result is received
        group.receive(0, RESULT)
    assert not isinstance(raised.value, WorkerError)
    closing_it.join()
    assert group.closed


def test_closing_from_a_signal_handler_ends_the_call_it_interrupts():
    acts: list[list[Any]] = [READY, ["serve", 1], ["signal_coordinator", "SIGUSR1"], HANG]
    group = until_ready(start({0: acts}))
    before = signal.signal(signal.SIGUSR1, lambda number, frame: group.close())
    try:
        with pytest.raises(RuntimeError, match="this engine is closed"):
            run_steps(group, 2)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_is_running_distinguishes_running_and_ended_processes():
    """The tests above rely on it."""
    group = until_ready(start())
    pids = group.pids
    assert all(map(is_running, pids))
    group.kill()
    assert not any(map(is_running, pids))
