"""Tests of programs with stub workers: when a program ends, its workers and their directory do too.

The fixture in tests/conftest.py checks this after each test, within five seconds.
"""

import signal

import pytest

from tests.leaks import wait_until
from tests.scripts import running
from tests.supervision.stub_worker import HANG

pytestmark = pytest.mark.usefixtures("stub_workers", "ctrl_c_raises")

LONG_S = 60.0


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "raise SystemExit", "group.close()"])
def test_the_end_of_the_program_takes_the_workers_along(ending):
    code = f"""
import sys
from stub_worker import start, until_ready
group = until_ready(start())
{ending}
"""
    with running(code) as script:
        assert "Traceback" not in script.finish()
        assert script.exit_code == 0


def test_an_uncaught_exception_takes_the_workers_along():
    code = """
from stub_worker import HANG, READY, start, until_ready
group = until_ready(start({0: [READY, HANG]}))
raise OSError("something else went wrong")
"""
    with running(code) as script:
        assert "something else went wrong" in script.finish()


# What the program does, and where in it `kill_me()` stands.
MOMENTS = {
    "before the first start": """
processes.subprocess.Popen = lambda *args, **kwargs: kill_me()
start()
""",
    "between two starts": """
spawn = processes.subprocess.Popen
def popen(*args, **kwargs):
    process = spawn(*args, **kwargs)
    kill_me()
    return process
processes.subprocess.Popen = popen
start()
""",
    "workers just started": """
group = start()
kill_me()
""",
    "loading": """
acts = {rank: [["say", "loading"], HANG] for rank in range(2)}
group = start(acts, on_phase=lambda rank, phase: phase == "loading" and kill_me())
group.receive_control(0)
""",
    "idle": """
group = until_ready(start())
kill_me()
""",
    "running": """
group = until_ready(start({rank: [READY, ["serve", 1], HANG] for rank in range(2)}))
for _ in range(2):
    group.send(STEP, [b"plan"])
group.receive(0, RESULT)
kill_me()
""",
    "a worker stopped": """
group = start({1: [["signal_self", "SIGSTOP"]]})
while "T" not in open(f"/proc/{group.pids[1]}/stat").read().rpartition(") ")[2][:1]:
    pass
kill_me()
""",
    "a worker in native code": """
group = start({1: [["say", "importing"], ["seize_interpreter"]]})
group.receive_control(0)
while group.phases[1] != "importing":
    group._collect()
kill_me()
""",
    "closing": """
group = until_ready(start())
processes.shutil.rmtree = lambda *args, **kwargs: kill_me()  # the workers have ended by then
group.close()
""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_coordinator_takes_everything_along(moment):
    code = f"""
import os, signal
from stub_worker import HANG, READY, start, until_ready
from tpllm.channel.step_plan import RESULT, STEP
from tpllm.supervision import processes

def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)

{MOMENTS[moment]}
"""
    with running(code) as script:
        assert script.exit_code == -signal.SIGKILL


IDLE = """
import os, signal, sys, time
from stub_worker import start, until_ready
group = until_ready(start())
print("idle", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_coordinator_ended_by_a_signal_takes_everything_along(number):
    # a program started by nohup, as the tests may have been, inherits that it ignores SIGHUP
    code = f"import signal\nsignal.signal({int(number)}, signal.SIG_DFL)" + IDLE
    with running(code + "time.sleep(600)") as script:
        script.wait_for("idle")
        script.process.send_signal(number)
        assert script.exit_code == -number


def test_a_coordinator_that_becomes_another_program_takes_the_workers_along():
    """Its process continues, so only the end of the thread that started them ends the workers."""
    code = IDLE + 'os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])'
    with running(code) as script:
        script.wait_for("idle")
        assert wait_until(lambda: not script.worker_pids(), LONG_S)


def test_a_forked_copy_cannot_use_or_end_the_engine():
    code = (
        IDLE
        + """
child = os.fork()
if child == 0:
    for call in (lambda: group.send(1, [b"plan"]), lambda: group.receive(0, 2)):
        try:
            call()
        except RuntimeError as error:
            print(error)
    group.close()
    group.kill()
    del group
    sys.exit(0)  # runs the exit handlers
assert os.waitpid(child, 0)[1] == 0
group.send(1, [b"plan"])
assert group.receive(0, 2).payload.tobytes() == b"plan"
group.close()
print("done")
"""
    )
    with running(code) as script:
        output = script.finish()
        refusal = (
            f"this engine belongs to process {script.process.pid}; a forked copy cannot use it"
        )
        assert output.count(refusal) == 2, output
        assert "done" in output


def test_an_engine_works_in_a_process_without_standard_streams(tmp_path):
    result = tmp_path / "result"
    code = f"""
import os
os.closerange(0, 3)
from stub_worker import start, until_ready
group = until_ready(start())
group.send(1, [b"plan"])
payload = group.receive(0, 2).payload.tobytes()
group.close()
open({str(result)!r}, "wb").write(payload)
"""
    with running(code) as script:
        assert script.exit_code == 0
    assert result.read_bytes() == b"plan"


# Ways in which a program reaps child processes that it did not start itself; each defines `end`.
REAPERS = {
    "ignores them": """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def end(pid):
    os.kill(pid, signal.SIGKILL)
""",
    # Between kill and waitpid no other thread runs: both calls keep the interpreter lock (PyDLL),
    # and no switch is due. Otherwise the watch thread could read the exit status first.
    "reaps them": """
libc = ctypes.PyDLL(None)
def end(pid):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)
    libc.kill(pid, signal.SIGKILL)
    libc.waitpid(pid, None, 0)
    sys.setswitchinterval(interval)
""",
}


@pytest.mark.parametrize("acts", [None, {1: [["say", "loading"], HANG]}], ids=["idle", "loading"])
@pytest.mark.parametrize("reaper", REAPERS)
def test_workers_in_a_program_that_reaps_its_children(reaper, acts):
    """The exit codes are lost then, and the error says that they are unknown."""
    code = f"""
import ctypes, os, signal, sys
{REAPERS[reaper]}
from stub_worker import start, until_ready
from tpllm.errors import WorkerError
group = start({acts})
if {acts is None}:
    until_ready(group)
end(group.pids[1])
try:
    group.receive(1, 2)
except WorkerError as error:
    print(error)
    print([error.rank, error.cause, error.signal])
    print("What the report says:", error.report.read_text())
"""
    with running(code) as script:
        output = script.finish()
        message = "worker rank 1 ended (exit status unknown) while "
        assert output.count(message) == 2, output  # also in the report
        assert "[1, 'exit status unknown', None]" in output
        assert "exit code" not in output


def test_ctrl_c_while_workers_load_ends_the_program_without_a_trace():
    code = """
from stub_worker import HANG, start
acts = {0: [["say", "loading"], HANG], 1: [HANG]}
group = start(acts, on_phase=lambda rank, phase: print(phase, flush=True))
group.receive_control(0)
"""
    with running(code) as script:
        script.wait_for("loading")
        script.interrupt()
        assert "KeyboardInterrupt" in script.finish()
        assert script.exit_code == -signal.SIGINT
