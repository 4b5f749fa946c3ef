"""The caller's side of an engine that runs in a separate process."""

import os
from collections.abc import Callable

from tpllm.config.engine_config import EngineConfig
from tpllm.errors import WorkerError
from tpllm.supervision import messages
from tpllm.supervision.child import how_it_ended
from tpllm.supervision.connection import Connection, Message
from tpllm.supervision.interrupts import Interrupts
from tpllm.supervision.launcher import CLOSE_TIMEOUT_S
from tpllm.supervision.processes import ChildProcesses, open_output

MODULE = "tpllm.supervision.engine_process"
_PING_AFTER_S = 5.0  # after this time without a message
_GRACE_S = 5.0  # for the engine's process to end after its connection has ended


class EngineClient:
    """Starts an engine's process, exchanges messages with it, and makes sure that it ends.

    `on_phase(rank, phase)` is called as the workers make progress, until they are ready.

    Raises:
        ValueError: the engine refused a setting; all its processes have ended.
        WorkerError: the engine failed to start; all its processes have ended.
    """

    def __init__(
        self, config: EngineConfig, *, on_phase: Callable[[int, str], None] | None = None
    ) -> None:
        self.worker_pids: list[int] = []  # known once it is ready
        self._config = config
        self._received: list[Message] = []  # messages that `receive` has not returned yet
        self._silent_s = 0.0
        self._stopped_s = 0.0
        self._processes = ChildProcesses()
        with self._processes.released_with(self):
            with Interrupts():  # an interrupt between creating and recording a resource leaks it
                spec, output = {"config": config.to_json()}, open_output(self._processes)
                self._process, ours = self._processes.start_connected(MODULE, spec, output)
                self._connection = self._processes.keep_open(Connection(ours))
            ready = self._wait_until_ready(on_phase)
            self.worker_pids = ready["worker_pids"]
            self.max_total_tokens: int = ready["max_total_tokens"]

    def _wait_until_ready(self, on_phase: Callable[[int, str], None] | None) -> Message:
        """Return the engine's "ready" message; pass on the phases that come before it."""
        while True:
            for message in self.receive():
                if message["type"] == "ready":
                    return message
                if on_phase:
                    on_phase(message["rank"], message["phase"])

    @property
    def pid(self) -> int:
        """The process id of the engine, the parent of its workers."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        return self._processes.released.is_set()

    def send(self, message: Message) -> None:
        """Queue a message for sending. This never waits."""
        self._connection.send(message)

    def receive(self) -> list[Message]:
        """Sleep until messages come, and return them. An engine that sends nothing is pinged.

        Raises:
            ClosedError: this side has closed the engine.
            ValueError, WorkerError: the engine has failed; all its processes have ended.
        """
        with self._processes.use():
            while not self._received:
                try:
                    self._received = self._receive_or_ping()
                except EOFError:
                    self._processes.refuse_if_ending()
                    raise self._describe_end() from None
        last = self._received[-1]
        if last["type"] != "error":
            received, self._received = self._received, []
            return received
        if len(self._received) > 1:  # return the messages before the error first
            received, self._received = self._received[:-1], [last]
            return received
        self._processes.release(_GRACE_S)
        raise messages.read_error(last)

    def _receive_or_ping(self) -> list[Message]:
        """Return messages other than replies to a ping; if none come, ping the engine.

        The silence is counted in waits, not by the clock: if this process or the machine was
        suspended, the engine had no chance to reply.

        Raises:
            WorkerError: the engine has not replied for too long.
        """
        received = self._connection.receive(_PING_AFTER_S)
        if received:
            self._silent_s = self._stopped_s = 0.0
            return [message for message in received if message["type"] != "alive"]
        if self._silent_s == 0 and self.worker_pids:  # while it starts it reads no messages
            self.send({"type": "alive"})
        self._silent_s += _PING_AFTER_S
        self._stopped_s = self._stopped_s + _PING_AFTER_S if self._process.is_stopped() else 0.0
        self._refuse_long_silence()
        return []

    def _refuse_long_silence(self) -> None:
        # the engine has deadlines for its workers: a longer silence is its own failure
        limit_s = self._config.start_timeout_s + self._config.step_timeout_s
        if self._stopped_s > self._config.step_timeout_s:
            limit_s, state = self._config.step_timeout_s, "is stopped, as by SIGSTOP"
        elif self.worker_pids and self._silent_s > limit_s:
            state = "does not answer"
        else:  # it may be loading, which may take any time
            return
        self._processes.refuse_if_ending()
        self.kill()
        raise WorkerError(
            f"the engine's process {state}; it was killed after {limit_s:g} s",
            cause="hang",
        )

    def _describe_end(self) -> WorkerError:
        code = self._process.wait(_GRACE_S)
        self.kill()
        if code is None:
            return WorkerError("the engine's process closed its connection but did not end")
        how, usual_reason = how_it_ended(code)
        return WorkerError(f"the engine's process {how}; {usual_reason}")

    def close(self) -> None:
        """Shut the engine down, and kill it if it does not end. A forked copy does nothing."""
        if self.closed or os.getpid() != self._processes.owner_pid:
            return
        self.send({"type": "shutdown"})
        # the time that the engine waits for its workers, and its own
        self._processes.release(CLOSE_TIMEOUT_S + _GRACE_S)

    def kill(self) -> None:
        """Kill the engine at once. Its workers then end by themselves."""
        self._processes.release()
