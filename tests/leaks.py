"""What a test must not leave behind: processes, threads, descriptors, files.

The session has a temporary directory of its own (see conftest.py). Every process that it starts
inherits the directory as TMPDIR; an engine's workers get a directory inside it. This identifies our
processes among those of others on the machine, even if their parent has changed. The kernel does
not show this environment for a forked process. That one is identified by its parent, or by the
guard of its engine's directory, a program that ends after the last worker.
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

DEADLINE_S = 5.0  # the documented limit, however an engine ends


def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Poll until `is_so` returns True; return False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    return process_state(pid) not in ("", "Z", "X")


def process_state(pid: int) -> str:
    """Return the kernel's state character of a process, such as R, S, T or Z; "" if it is gone."""
    return _state_and_parent(pid)[0]


def worker_pids() -> dict[int, Path]:
    """Return the workers of this test session, with their engine's directory."""
    found = {}
    ours = Path(tempfile.gettempdir())  # other sessions may run on this machine
    for pid in _all_pids():
        directory = Path(_temporary_directory(pid))
        if directory.parent == ours and directory.name.startswith("tpllm-") and is_running(pid):
            found[pid] = directory
    return found


def traces() -> Counter[str]:
    """Describe and count all processes, threads, descriptors and files of ours on the machine."""
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
    """Assert that everything that is not in `before` is gone within five seconds."""
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
    """List this process's open descriptors by kind; the numbers of pipes and sockets vary."""
    kinds: list[str] = []
    if torch.cuda.is_available():  # the driver opens some at any time
        return kinds
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the descriptor of the listing itself
        if not target.startswith("/dev/nvidia"):  # the driver's, kept until the process ends
            kinds.append("descriptor of " + target.split(":[")[0])
    return kinds


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # it has just ended, or we may not read it
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
