"""Has forms of answers tried by a process that may crash, before this one compiles them.

Compiling a grammar is native code over text from outside: a stack that overflows, or memory that
runs out, ends the process it runs in. So each new form goes to a child first (`trial_process`),
under limits of time and memory. If that dies, the form is refused, and the next one gets another.
"""

import json
import os
import signal
import socket
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any, NoReturn

from tpllm.channel.child_process import write_spec
from tpllm.channel.ring import wait_readable
from tpllm.config.engine_config import EngineConfig
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.supervision.interrupts import Interrupts
from tpllm.supervision.processes import (
    ChildProcesses,
    ClosedError,
    child_environment,
    how_it_ended,
)

MODULE = "tpllm.supervision.trial_process"
CPU_S = 10  # of the child, for one form
MEMORY_BYTES = 2 << 30  # of address space, beyond what the child has with its tokenizer
# Waits of a second, not seconds: while this process is stopped, as by a debugger, none passes.
_MAX_WAITS = 120
_READ_BYTES = 1 << 16
_GRACE_S = 1.0  # for a process whose connection has ended to end


class Trials:
    """The child that tries forms; started with the first one. May be used by several threads.

    Args:
        config: tells the child where the tokenizer is
    """

    def __init__(self, config: EngineConfig, module: str = MODULE) -> None:
        self._config = config
        self._module = module
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._closed = False

    def check(self, form: StructuredOutputsParams) -> None:
        """Return if the form compiles and an answer can be followed for some steps.

        Raises:
            ValueError: why it cannot be used.
            RuntimeError: the child cannot be started, or `close` was called.
        """
        with self._lock:
            try:
                error = self._ask(form.to_dict())
            except _KilledError:  # perhaps before it read the form
                error = self._ask(form.to_dict())
        if error is not None:
            raise ValueError(error)

    def _ask(self, form: dict[str, Any]) -> str | None:
        """Why the form cannot be used, by the child's word or by its death; None if it can."""
        try:
            if self._child is None:
                self._child = _Child(self._config, self._module)
            if self._closed:  # meanwhile
                raise ClosedError("this engine is closed")
            return self._child.ask(form)
        except _DiedError as death:
            self._end_child()
            return str(death)
        except BaseException:  # such as Ctrl-C: its reply may still come, and is nobody's
            self._end_child()
            raise

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def close(self) -> None:
        """End the child; wakes a thread that waits for it. Harmless when repeated."""
        self._closed = True
        child = self._child
        if child is not None:
            child.end()


class _DiedError(Exception):
    """The child died of the form, or had to be ended; says how."""


class _KilledError(Exception):
    """The child was killed from outside."""


class _Child:
    """One life of the process.

    Raises:
        RuntimeError: it ended before it could try anything.
    """

    def __init__(self, config: EngineConfig, module: str) -> None:
        self._processes = ChildProcesses(os.getpid())
        self._finalizer = weakref.finalize(self, self._processes.release)
        try:
            with Interrupts():  # what has been made, but not yet noted, could not be given back
                self._start(config, module)
            self._wait_until_ready()
        except BaseException:
            self._processes.release()
            raise

    def _wait_until_ready(self) -> None:
        try:
            with self._processes.use():
                self._receive()
        except (_DiedError, _KilledError) as death:
            raise RuntimeError(
                f"the process that tries structured_outputs ended before the first: {death}"
            ) from None

    def _start(self, config: EngineConfig, module: str) -> None:
        processes = self._processes
        ours, theirs = socket.socketpair()
        self._socket = ours
        processes.channels.append(ours)
        with theirs:
            parent = os.pidfd_open(os.getpid())
            # what native code has to say of a form's crash is not for the user's terminal
            silence = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            spec = {
                "config": config.to_json(),
                "parent": parent,
                "socket": theirs.fileno(),
                "cpu_s": CPU_S,
                "memory_bytes": MEMORY_BYTES,
            }
            spec_fd = write_spec(spec)
            processes.descriptors += [parent, silence, spec_fd]
            command = [sys.executable, "-P", "-m", module, str(spec_fd)]
            inherited = (spec_fd, parent, theirs.fileno())
            processes.spawn([(command, inherited)], child_environment(), silence)

    def ask(self, form: dict[str, Any]) -> str | None:
        """Why the form cannot be used; None if it can.

        Raises:
            _DiedError, _KilledError: it has ended instead, or answers no more.
        """
        with self._processes.use():
            with suppress(OSError):  # where it has ended, the next line says how
                self._socket.sendall(json.dumps(form).encode() + b"\n")
            error: str | None = self._receive()["error"]
        return error

    def _receive(self) -> dict[str, Any]:
        received = b""
        for _ in range(_MAX_WAITS):
            if not wait_readable(self._socket.fileno(), 1.0):
                continue
            try:
                piece = self._socket.recv(_READ_BYTES)
            except OSError:
                piece = b""
            if not piece:
                self._raise_end()
            received += piece
            if received.endswith(b"\n"):
                reply: dict[str, Any] = json.loads(received)
                return reply
        raise _DiedError(f"trying it took more than {_MAX_WAITS} s; make it simpler")

    def _raise_end(self) -> NoReturn:
        self._processes.refuse_if_ending()
        self._processes.release(_GRACE_S)
        code = self._processes.processes[0].poll()
        assert code is not None, "it has been released"
        if code == -signal.SIGKILL:
            raise _KilledError("it was killed")
        if code == -signal.SIGXCPU:
            raise _DiedError(f"trying it took more than {CPU_S} s; make it simpler")
        how, _ = how_it_ended(code)
        raise _DiedError(
            f"the compiler crashed on it, or took more than {MEMORY_BYTES >> 20} MiB or {CPU_S} s: "
            f"the process that tried it {how}; make it simpler"
        )

    def end(self) -> None:
        """Kill it, if it still runs, and give everything back."""
        self._processes.release()
