"""Child processes, and everything else that has to be released with them.

This is separate from the object that exchanges messages with them, so that a finalizer can hold it.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tpllm.channel.child_process import write_spec
from tpllm.supervision import guard
from tpllm.supervision.child import Child
from tpllm.supervision.interrupts import Interrupts

Command = tuple[list[str], tuple[int, ...]]  # arguments, and the descriptors to inherit


class ClosedError(RuntimeError):
    """The owner of the engine closed it."""


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


@dataclass
class ChildProcesses:
    """Child processes, and the resources that this process shares with them.

    Any thread, a signal handler or the garbage collector may call `release`, also while another
    call uses a channel. It ends the processes at once, which wakes that call. The last of these
    calls to return closes the descriptors.
    """

    owner_pid: int = field(default_factory=os.getpid)
    directory: Path | None = None
    guard: Child | None = None  # see tpllm.supervision.guard
    processes: list[Child] = field(default_factory=list)
    channels: list[Closable] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    ending: bool = False
    released: threading.Event = field(default_factory=threading.Event)
    # held to start a process and to end them all, so that none is started after the end
    lock: threading.RLock = field(default_factory=threading.RLock)
    _in_use: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def released_with(self, owner: object) -> Iterator[None]:
        """Start `owner`: release everything if the `with` block fails.

        Later this happens at the collection of `owner` or at the interpreter's exit, whichever
        comes first.
        """
        weakref.finalize(owner, self.release)
        try:
            yield
        except BaseException:
            self.release()
            raise

    def keep(self, fd: int) -> int:
        """Record a descriptor that has to be closed, and return it."""
        self.descriptors.append(fd)
        return fd

    def keep_open(self, channel: C) -> C:
        """Record a channel that has to be closed before the descriptors, and return it."""
        self.channels.append(channel)
        return channel

    def command(self, module: str, spec: dict[str, Any], inherited: Sequence[int]) -> Command:
        """Return the command `python -m MODULE FD`, for a child that calls `begin_child`.

        Args:
            spec: plain data for the child
            inherited: the descriptors in it
        """
        fd = self.keep(write_spec({**spec, "parent": self._own_pidfd}))
        inherited = (fd, self._own_pidfd, *inherited)
        return [sys.executable, "-P", "-m", module, str(fd)], inherited

    @cached_property
    def _own_pidfd(self) -> int:
        return self.keep(os.pidfd_open(self.owner_pid))

    def start_connected(
        self, module: str, spec: dict[str, Any], output: int
    ) -> tuple[Child, socket.socket]:
        """Start `python -m MODULE FD`, whose spec also holds "socket"; return it with our end."""
        ours, theirs = socket.socketpair()
        self.keep_open(ours)
        with theirs:
            spec = {**spec, "socket": theirs.fileno()}
            command = self.command(module, spec, [theirs.fileno()])
            (child,) = self.spawn([command], output)
        return child, ours

    def release(self, timeout_s: float = 0.0) -> None:
        """Wait `timeout_s` for the processes to end, kill the others and release everything.

        It does nothing in a forked copy of the owner, nor at the second call.
        """
        if os.getpid() != self.owner_pid:
            return
        deadline = time.monotonic() + timeout_s
        try:
            self.ending = True
            while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
                time.sleep(0.005)
        finally:  # Ctrl-C ends the waiting, and is raised after the rest
            with Interrupts(), self.lock:
                if not self.released.is_set():
                    self._end_everything()

    def _end_everything(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self._close_descriptors()
        if self.directory is not None:  # no process is left that could create it again
            shutil.rmtree(self.directory, ignore_errors=True)
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()
        self.released.set()

    def spawn(
        self, commands: Sequence[Command], output: int, lifeline: int | None = None
    ) -> list[Child]:
        """Start processes from a thread that lives as long as they do.

        The kernel sends a child its parent-death signal when the thread that started it ends, not
        when the process ends. A short-lived thread of the caller must therefore not start it.

        Args:
            output: where they write, a descriptor or subprocess.DEVNULL
            lifeline: reading end of a pipe whose writing end the processes hold: they use the
                directory, and its guard is started first; None for processes that do not

        Returns:
            the processes; fewer than `commands` if `release` was called meanwhile
        """
        started: Future[list[Child]] = Future()

        def run() -> None:
            try:
                started.set_result(self._start_all(commands, output, lifeline))
            except BaseException as error:
                started.set_exception(error)
            self.released.wait()

        threading.Thread(target=run, name="tpllm-launcher", daemon=True).start()
        return started.result()

    def _start_all(
        self, commands: Sequence[Command], output: int, lifeline: int | None
    ) -> list[Child]:
        if lifeline is not None:
            arguments = [sys.executable, "-I", "-S", guard.__file__]
            arguments += [str(self.directory), str(lifeline)]
            with self.lock:
                if not self.ending:
                    self.guard = _start((arguments, (lifeline,)), dict(os.environ), output)
        environment = _environment(None if lifeline is None else self.directory)
        children: list[Child] = []
        for command in commands:
            with self.lock:
                if self.ending:
                    break
                self.processes.append(_start(command, environment, output))
                children.append(self.processes[-1])
        return children

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the descriptors open while a `with` block runs.

        Raises:
            ClosedError: the engine is closed.
            RuntimeError: another call uses the engine, or it belongs to another process.
        """
        if os.getpid() != self.owner_pid:
            raise RuntimeError(
                f"this engine belongs to process {self.owner_pid}; a forked copy cannot use it"
            )
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("this engine is in the middle of another call; wait for its end")
        try:
            self.refuse_if_ending()
            yield
        finally:
            self._in_use.release()
            if self.ending:
                self._close_descriptors()

    def refuse_if_ending(self) -> None:
        if self.ending:
            raise ClosedError("this engine is closed")

    def _close_descriptors(self) -> None:
        if not self._in_use.acquire(blocking=False):
            return  # the call that uses the descriptors closes them when it returns
        while self.channels:
            self.channels.pop().close()
        while self.descriptors:
            os.close(self.descriptors.pop())
        self._in_use.release()


def _start(command: Command, environment: dict[str, str], output: int) -> Child:
    arguments, inherited = command
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=inherited,
        env=environment,
        start_new_session=True,  # Ctrl-C in the terminal reaches only the coordinator
    )
    process.returncode = 0  # Child waits for it from here on, so subprocess must not
    return Child(process.pid)


def _environment(directory: Path | None) -> dict[str, str]:
    """Return a child's environment: it imports this tpllm and puts temporary files in `directory`.

    GPUs are numbered as NVML numbers them, since the settings were checked with NVML.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        **({} if directory is None else {"TMPDIR": str(directory)}),
    }


def open_output(processes: ChildProcesses) -> int:
    """Return where children write: to stderr, so that it does not mix with the caller's output.

    Those descriptors of 0, 1 and 2 that are closed, as in a daemon, are opened first. If a ring got
    such a number, the workers' standard streams would replace it.
    """
    try:
        os.fstat(2)
        output = 2
    except OSError:
        output = subprocess.DEVNULL
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        processes.descriptors.append(fd)
    os.close(fd)
    return output
