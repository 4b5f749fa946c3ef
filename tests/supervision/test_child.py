"""Tests of a child process and its exit code, also if other code reaps it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpllm.supervision.child import UNKNOWN_EXIT_CODE, Child, how_it_ended


def start(code: str) -> Child:
    process = subprocess.Popen(["sh", "-c", code])
    process.returncode = 0
    return Child(process.pid)


@pytest.mark.parametrize(
    "code, exit_code", [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -15 $$", -15)]
)
@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_an_exit_code_is_returned(code, exit_code, timeout_s):
    child = start(code)
    assert child.wait(timeout_s) == child.poll() == child.exit_code == exit_code
    child.kill()
    assert child.poll() == exit_code


def test_a_running_child_has_no_exit_code_and_can_be_killed():
    child = start("exec sleep 60")
    assert child.poll() is None
    assert child.wait(timeout_s=0.01) is None
    child.kill()
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("ask", [Child.poll, Child.wait, lambda child: child.wait(30.0)])
def test_the_exit_code_is_unknown_if_other_code_has_read_it(ask: Callable):
    child = start("kill -9 $$")
    os.waitpid(child.pid, 0)
    assert ask(child) == child.exit_code == UNKNOWN_EXIT_CODE
    child.kill()  # it kills no other process
    how, reason = how_it_ended(UNKNOWN_EXIT_CODE)
    assert how == "ended (exit status unknown)"
    assert "reaps its child processes itself (SIGCHLD)" in reason


def test_the_exit_code_is_unknown_where_the_kernel_reaps():
    code = """
import signal, subprocess
from tpllm.supervision.child import UNKNOWN_EXIT_CODE, Child
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for timeout_s in (None, 30.0):
    child = Child(subprocess.Popen(["true"]).pid)
    assert child.wait(timeout_s) == UNKNOWN_EXIT_CODE
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_thread_gets_the_same_exit_code():
    for child in [start("exit 3") for _ in range(20)]:
        with ThreadPoolExecutor(4) as pool:
            exit_codes = list(pool.map(Child.wait, [child] * 4))
        assert exit_codes == [3] * 4
