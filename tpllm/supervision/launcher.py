"""Starts the workers of an engine, exchanges records with them, and ends all of them together.

The workers run on one host or several, which all look the same from here (`host.Host`). If a worker
ends, its host says so; if no process ends and no message comes, a deadline passes.
"""

import json
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from tpllm.channel.ring import Buffer, Record, wait_readable
from tpllm.channel.step_plan import CONTROL, RESULT
from tpllm.engine.transport import Transport
from tpllm.errors import SettingError
from tpllm.supervision.diagnosis import RankState
from tpllm.supervision.failure import Failure, failure_of_exits, failure_of_hang, wait_for_exits
from tpllm.supervision.host import Host, Launch
from tpllm.supervision.inbox import Inbox
from tpllm.supervision.interrupts import Interrupts
from tpllm.supervision.local_host import start_local_host
from tpllm.supervision.processes import ChildProcesses
from tpllm.supervision.watch import Timeouts, Watch

CLOSE_TIMEOUT_S = 3.0

StartHosts = Callable[[Launch, ChildProcesses], Sequence[Host]]


class WorkerGroup(Transport):
    """The workers of one engine, on all of its hosts.

    Plans and control records go to all workers. Each worker replies, and rank 0 also sends the
    results of steps.

    Args:
        launch: what the workers are started with
        timeouts: how long the workers may be silent before they are killed
        on_phase: called with `(rank, phase)` for each phase that a worker reports while it starts
        start_hosts: starts all ranks and returns their hosts in rank order

    Raises:
        SettingError: this host lacks a resource; and as every method of a `Transport` raises.
    """

    def __init__(
        self,
        launch: Launch,
        timeouts: Timeouts,
        on_phase: Callable[[int, str], None] | None = None,
        start_hosts: StartHosts = start_local_host,
    ) -> None:
        self.world_size = launch.world_size
        self._settings = launch.settings
        self._processes = ChildProcesses()
        # an interrupt between creating and recording a resource leaks it
        with self._processes.released_with(self), Interrupts():
            hosts = self._hosts = start_hosts(launch, self._processes)
            self._workers = [worker for host in hosts for worker in host.workers]
            self._inbox = Inbox([reader for host in hosts for reader in host.replies], on_phase)
            self._ends = {fd for host in hosts for fd in host.ends}
            self._poll = select.poll()
            for fd in (*self._ends, *(reader.fileno() for reader in self._inbox.readers)):
                self._poll.register(fd, select.POLLIN)
            self.watch = Watch(timeouts, lambda: sum(host.beats() for host in hosts))

    @property
    def phases(self) -> list[str]:
        """The phase that each rank reported last."""
        return self._inbox.phases

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    # ---- messages ----------------------------------------------------------------------------

    def send(self, kind: int, buffers: Sequence[Buffer], step: int | None = None) -> None:
        with self._processes.use():
            self.watch.note_sending(step)
            for host in self._hosts:
                while not host.plans.try_send(kind, buffers):
                    self._processes.refuse_if_ending()
                    if self._some_worker_ended(0.0):
                        self._fail_with_cause()
                    if self.watch.remaining_s() <= 0:
                        self._fail_hung("took a record")
                    wait_readable(host.plans.fileno(), 0.1)

    def send_control(self, message: dict[str, Any]) -> None:
        self.send(CONTROL, [json.dumps(message).encode()])

    def receive(self, rank: int, kind: int) -> Record:
        with self._processes.use():
            while True:
                if (record := self._inbox.pop(rank, kind)) is not None:
                    if kind == RESULT:
                        self.watch.note_result()
                    return record
                # checked only now, so that records from before a failure are not lost
                if self._inbox.error_reports:
                    self._fail_with_cause()
                if self._collect():
                    continue
                remaining_s = self.watch.remaining_s()
                if remaining_s <= 0:
                    self._fail_hung("sent a message" if self.watch.step < 0 else "answered")
                # a worker sends its error report before it ends
                if self._some_worker_ended(remaining_s) and not self._collect():
                    self._fail_with_cause()

    def _collect(self) -> bool:
        """Receive what has come from the workers; return False if nothing has."""
        any_came = self._inbox.collect()
        if any_came:
            self.watch.note_activity()
        return any_came

    def receive_control(self, rank: int) -> dict[str, Any]:
        record = self.receive(rank, CONTROL)
        message: dict[str, Any] = json.loads(record.payload.tobytes())
        return message

    def sleep_until_readable(self, *fds: int) -> None:
        with self._processes.use():
            for fd in fds:
                self._poll.register(fd, select.POLLIN)
            try:
                while (ready := self._wait_for_events(timeout_s=None)).isdisjoint(fds):
                    self._collect()  # a worker sends its error report before it ends
                    if self._inbox.error_reports or ready & self._ends:
                        self._fail_with_cause()
            finally:
                for fd in fds:
                    self._poll.unregister(fd)

    def note_ready(self) -> None:
        self.phases[:] = ["ready"] * self.world_size

    def health(self) -> list[dict[str, Any]]:
        return [
            {"rank": rank, "pid": worker.pid, "phase": phase, "alive": worker.poll() is None}
            for rank, (worker, phase) in enumerate(zip(self._workers, self.phases, strict=True))
        ]

    # ---- ending ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._processes.released.is_set()

    def close(self) -> None:
        """Shut the workers down, and kill those that do not end. A forked copy does nothing."""
        if self.closed or os.getpid() != self._processes.owner_pid:
            return
        is_sent = False
        shutdown = json.dumps({"type": "shutdown"}).encode()
        # RuntimeError: another thread uses the hosts and waits for a step: the workers are killed
        with suppress(RuntimeError), self._processes.use():
            is_sent = all([host.plans.try_send(CONTROL, [shutdown]) for host in self._hosts])
        self._processes.release(CLOSE_TIMEOUT_S if is_sent else 0.0)

    def kill(self) -> None:
        self._processes.release()

    def _some_worker_ended(self, timeout_s: float) -> bool:
        """Sleep until a descriptor is readable or the time is over; return whether a worker ended.

        Raises:
            RuntimeError: the group is closed.
        """
        return not self._ends.isdisjoint(self._wait_for_events(timeout_s))

    def _wait_for_events(self, timeout_s: float | None) -> set[int]:
        events = self._poll.poll(None if timeout_s is None else timeout_s * 1e3)
        self._processes.refuse_if_ending()
        return {fd for fd, _ in events}

    # ---- failing -----------------------------------------------------------------------------

    def _fail_with_cause(self) -> NoReturn:
        """Wait a moment for the rank that failed first, kill all workers and raise its error."""
        exit_codes = wait_for_exits(self._workers, self._inbox)
        self._processes.refuse_if_ending()
        error_reports = self._inbox.error_reports
        if not exit_codes and error_reports and min(error_reports).is_setting:
            self.kill()
            raise SettingError(min(error_reports).text)
        ranks = self._examine()
        self._fail(ranks, failure_of_exits(ranks, self.watch, error_reports, exit_codes))

    def _fail_hung(self, expected: str) -> NoReturn:
        """Kill all workers and raise an error with the state of every rank."""
        ranks = self._examine()
        self._fail(ranks, failure_of_hang(ranks, self.watch, expected))

    def _examine(self) -> list[RankState]:
        return [state for host in self._hosts for state in host.examine(self.phases)]

    def _fail(self, ranks: list[RankState], failure: Failure) -> NoReturn:
        self.kill()
        raise failure.to_error(ranks, self.watch, self._settings)
