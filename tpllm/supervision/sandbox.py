"""Tries grammars in a child process that may crash, before this process compiles them.

Native code compiles a grammar from untrusted text. A stack overflow or exhausted memory there ends
its process. Each new grammar is compiled in a child process first (`sandbox_process`), with limits
of time and memory. If the child dies, the grammar is refused and a new child is started for the
next one.
"""

import json
import os
import signal
import threading
from contextlib import suppress
from typing import Any, NoReturn

from tpllm.channel.ring import wait_readable
from tpllm.config.engine_config import EngineConfig
from tpllm.structured_outputs import StructuredOutputsParams
from tpllm.supervision.child import how_it_ended
from tpllm.supervision.interrupts import Interrupts
from tpllm.supervision.processes import ChildProcesses, ClosedError

MODULE = "tpllm.supervision.sandbox_process"
CPU_S = 10  # CPU time of the child for one grammar
MEMORY_BYTES = 2 << 30  # address space beyond what the child uses once it has read its tokenizer
# waits of one second each: they do not pass while this process is stopped, as by a debugger
_MAX_WAITS = 120
_READ_BYTES = 1 << 16
_GRACE_S = 1.0  # for the child to end after its connection has ended


class Sandbox:
    """Tries grammars in a child process, which starts at first use. Several threads may use it.

    Args:
        config: the engine's settings, with the folder of the tokenizer
        module: the module that the child runs
    """

    def __init__(self, config: EngineConfig, module: str = MODULE) -> None:
        self._config = config
        self._module = module
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._closed = False

    def check(self, params: StructuredOutputsParams) -> None:
        """Return if the grammar compiles and outputs can follow it for some tokens.

        Raises:
            ValueError: the grammar cannot be used; the error says why.
            RuntimeError: the child cannot be started, or `close` was called.
        """
        with self._lock:
            try:
                error = self._try(params.to_dict())
            except _KilledError:  # possibly before it read the grammar
                error = self._try(params.to_dict())
        if error is not None:
            raise ValueError(error)

    def _try(self, params: dict[str, Any]) -> str | None:
        """Return why the grammar cannot be used, as replied or from the child's death, or None."""
        try:
            if self._child is None:
                self._child = _Child(self._config, self._module)
            if self._closed:  # while the child started
                raise ClosedError("this engine is closed")
            return self._child.try_grammar(params)
        except _DiedError as death:
            self._end_child()
            return str(death)
        except BaseException:  # such as Ctrl-C: a later call must not receive this reply
            self._end_child()
            raise

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def close(self) -> None:
        """End the child, and wake a thread that waits for it. It may be called repeatedly."""
        self._closed = True
        child = self._child
        if child is not None:
            child.end()


class _DiedError(Exception):
    """The grammar made the child crash, or exceed a limit; the text says how."""


class _KilledError(Exception):
    """Another process killed the child."""


class _Child:
    """One child process.

    Raises:
        RuntimeError: it ended before it was ready.
    """

    def __init__(self, config: EngineConfig, module: str) -> None:
        self._processes = ChildProcesses()
        with self._processes.released_with(self):
            with Interrupts():  # an interrupt between creating and recording a resource leaks it
                # output of native code about a crash must not reach the user's terminal
                silence = self._processes.keep(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
                spec = {"config": config.to_json(), "cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES}
                self._process, self._socket = self._processes.start_connected(module, spec, silence)
            try:
                with self._processes.use():
                    self._receive()  # it is ready
            except (_DiedError, _KilledError) as death:
                raise RuntimeError(
                    f"the process that checks structured_outputs ended before it was ready: {death}"
                ) from None

    def try_grammar(self, params: dict[str, Any]) -> str | None:
        """Return why the grammar cannot be used, or None if it can.

        Raises:
            _DiedError, _KilledError: the child has ended, or does not reply.
        """
        with self._processes.use():
            with suppress(OSError):  # if the child has ended, `_receive` raises how
                self._socket.sendall(json.dumps(params).encode() + b"\n")
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
        raise _DiedError(f"compiling it took more than {_MAX_WAITS} s; make it simpler")

    def _raise_end(self) -> NoReturn:
        self._processes.refuse_if_ending()
        self._processes.release(_GRACE_S)
        code = self._process.poll()
        assert code is not None, "it has been released"
        if code == -signal.SIGKILL:
            raise _KilledError("it was killed")
        if code == -signal.SIGXCPU:
            raise _DiedError(f"compiling it took more than {CPU_S} s; make it simpler")
        how, _ = how_it_ended(code)
        raise _DiedError(
            f"the compiler crashed on it, or took more than {MEMORY_BYTES >> 20} MiB or {CPU_S} s: "
            f"its process {how}; make it simpler"
        )

    def end(self) -> None:
        """Kill the child, if it still runs, and release its resources."""
        self._processes.release()
