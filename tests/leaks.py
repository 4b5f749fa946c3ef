"""What a test must not leave behind: processes, threads, descriptors, files.

The session has a temporary directory of its own (see conftest.py), and every process it starts
inherits it as TMPDIR, an engine's workers a directory inside it. So our processes can be told from
those of others on the machine, whoever their parent is by now. Of one that was forked the kernel
shows no such environment; it is told by its parent, or by the guard of its engine's directory, a
program that ends when the last worker has.
"""

import gc
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

DEADLINE_S = 5.0  # what the engine promises, whatever ended it


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Look again and again until it is so; False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_running(pid: int) -> bool:
    """Whether the process is there, and is not a zombie that its parent may not want to reap."""
    return process_state(pid) not in ("", "Z", "X")


def process_state(pid: int) -> str:
    """The letter that the kernel gives its state, such as R, S, T or Z; "" if it is not there."""
    return _state_and_parent(pid)[0]


def worker_pids() -> dict[int, Path]:
    """The workers of this test session, whoever started them, with their engine's directory."""
    found = {}
    ours = Path(tempfile.gettempdir())  # another session's may run beside us
    for pid in _all_pids():
        directory = Path(_temporary_directory(pid))
        if directory.parent == ours and directory.name.startswith("tpllm-") and is_running(pid):
            found[pid] = directory
    return found


def traces() -> Counter[str]:
    """Everything of ours that is on the machine now, in words, and how many of each."""
    found = Counter(_processes())
    found.update(f"thread {t.name}" for t in threading.enumerate() if t.name.startswith("tpllm"))
    found.update(_descriptors())
    found.update(f"/dev/shm/{name}" for name in os.listdir("/dev/shm"))
    found.update(
        f"directory {name}"
        for name in os.listdir(tempfile.gettempdir())
        if name.startswith("tpllm-")
    )
    return found


def assert_nothing_left(before: Counter[str]) -> None:
    """Nothing is here that was not in `before`, or it is gone within five seconds."""
    if wait_until(lambda: not traces() - before, 0.2):
        return
    gc.collect()  # an exception's traceback may hold an engine in a cycle
    wait_until(lambda: not traces() - before, DEADLINE_S)
    left = traces() - before
    assert not left, "left behind: " + ", ".join(
        f"{n} x {_explain(what)}" for what, n in left.items()
    )


def _processes() -> list[str]:
    ours = str(tempfile.gettempdir())
    return [
        f"process {pid}"
        for pid in _all_pids()
        if pid != os.getpid()
        and (_state_and_parent(pid)[1] == os.getpid() or _temporary_directory(pid).startswith(ours))
    ]


def _descriptors() -> list[str]:
    """What this process has open, by kind: the numbers of pipes and sockets mean nothing."""
    kinds: list[str] = []
    if torch.cuda.is_available():  # the driver opens some whenever it likes, here too
        return kinds
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # that of the listing itself
        if not target.startswith("/dev/nvidia"):  # the driver's, kept until the process ends
            kinds.append("descriptor of " + target.split(":[")[0])
    return kinds


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has just ended, or is not ours to look at
        return b""


def _state_and_parent(pid: int) -> tuple[str, int]:
    fields = _read(pid, "stat").rpartition(b") ")[2].split()
    return (fields[0].decode(), int(fields[1])) if fields else ("", 0)


def _temporary_directory(pid: int) -> str:
    for entry in _read(pid, "environ").split(b"\0"):
        if entry.startswith(b"TMPDIR="):
            return entry.removeprefix(b"TMPDIR=").decode()
    return ""


def _explain(what: str) -> str:
    kind, _, pid = what.partition(" ")
    if kind != "process":
        return what
    words = _read(int(pid), "cmdline").replace(b"\0", b" ").decode(errors="replace")
    return f"{what} ({words.strip() or 'a zombie'})"
