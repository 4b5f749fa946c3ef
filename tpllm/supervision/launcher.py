"""Starts the workers, one process per rank, watches them, and ends all of them.

A worker is `python -m tpllm.worker`. A fresh interpreter needs neither torchrun nor a main guard,
and works from a notebook or a script on standard input. A worker inherits its ring descriptors and
a pidfd of this process, and reads everything else from an anonymous file. However this process
ends, the kernel kills the workers. However a worker ends, this process is woken by the worker's
pidfd. If no process ends and no message comes, a deadline passes.
"""

import json
import os
import secrets
import select
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tpllm.channel.child_process import write_spec
from tpllm.channel.progress import Board, create_board
from tpllm.channel.ring import (
    Buffer,
    Record,
    RingReader,
    RingWriter,
    create_ring,
    wait_readable,
)
from tpllm.channel.step_plan import CONTROL, RESULT, PlanLimits
from tpllm.config.resources import refuse_too_few_descriptors, refuse_too_little_room
from tpllm.errors import SettingError
from tpllm.supervision.diagnosis import RankState, examine
from tpllm.supervision.failure import Failure, failure_of_exits, failure_of_hang, wait_for_exits
from tpllm.supervision.inbox import Inbox
from tpllm.supervision.interrupts import Interrupts
from tpllm.supervision.processes import (
    ChildProcesses,
    Command,
    child_environment,
    fill_standard_descriptors,
    stderr_or_null,
)
from tpllm.supervision.watch import Timeouts, Watch

CONTROL_BYTES = 1 << 16  # room for any control record; the worker truncates longer tracebacks
CLOSE_TIMEOUT_S = 3.0
_NUM_SLOTS = 8


class WorkerGroup:
    """The worker processes of one engine and the rings between them and the coordinator.

    One ring carries plans and control records to all workers. Each worker replies on its own ring,
    on which rank 0 also sends the results of steps.

    Args:
        world_size: number of workers.
        limits: the size of the largest step, which sets the size of the rings.
        settings: plain data that every worker receives at its start, as JSON.
        timeouts: how long the workers may be silent before they are killed.
        module: the module that a worker runs; tests pass another one.
        on_phase: called with `(rank, phase)` for each phase that a worker reports while it starts.

    Raises:
        WorkerError: any method raises it when a worker has failed; all processes have ended then.
        SettingError: a worker refused a setting, or this host lacks a resource; all processes have
            ended then.
        RuntimeError: the group is closed, possibly by another thread during a call.
    """

    def __init__(
        self,
        world_size: int,
        limits: PlanLimits,
        settings: dict[str, Any],
        timeouts: Timeouts,
        module: str = "tpllm.worker",
        on_phase: Callable[[int, str], None] | None = None,
    ) -> None:
        self.world_size = world_size
        self._settings = settings
        self._inbox = Inbox(world_size, on_phase)
        self._processes = ChildProcesses(os.getpid())
        # runs at garbage collection and at the interpreter's exit, whichever comes first
        self._finalizer = weakref.finalize(self, self._processes.release)
        try:
            with Interrupts():  # an interrupt between creating and recording a resource leaks it
                self._start(limits, timeouts, module)
        except BaseException:
            self._processes.release()
            raise

    def _start(self, limits: PlanLimits, timeouts: Timeouts, module: str) -> None:
        plan_bytes = max(limits.plan_bytes, limits.masks_bytes, CONTROL_BYTES)
        reply_bytes = max(limits.result_bytes, CONTROL_BYTES)
        output = stderr_or_null()
        refuse_too_few_descriptors(self.world_size)
        self._processes.descriptors += fill_standard_descriptors()
        plans = create_ring(self.world_size, _NUM_SLOTS, plan_bytes)
        self._processes.descriptors += plans.all()
        self._writer = RingWriter(plans)
        self._processes.channels.append(self._writer)
        refuse_too_little_room(tempfile.gettempdir())
        # only an unpredictable name: the workers create the directory, after the start of the guard
        # that removes it even if this process is killed
        directory = Path(tempfile.gettempdir()) / f"tpllm-{secrets.token_hex(8)}"
        self._processes.directory = directory
        self._stack_fds: list[int] = []
        coordinator = self._keep(os.pidfd_open(os.getpid()))
        board = self._keep(create_board(self.world_size))
        self._board = Board(board)
        self._processes.channels.append(self._board)
        lifeline = os.pipe()
        self._processes.descriptors += lifeline
        commands: list[Command] = []
        for rank in range(self.world_size):
            replies = create_ring(1, _NUM_SLOTS, reply_bytes)
            self._processes.descriptors += replies.all()
            self._inbox.readers.append(RingReader(replies, 0))
            self._processes.channels.append(self._inbox.readers[rank])
            stacks = self._keep(os.memfd_create("tpllm-stacks", os.MFD_CLOEXEC))
            self._stack_fds.append(stacks)
            spec = {
                "rank": rank,
                "world_size": self.world_size,
                "coordinator": coordinator,
                "lifeline": lifeline[1],
                "board": board,
                "stacks": stacks,
                "directory": str(directory),
                "plans": plans.all(),
                "replies": replies.all(),
                "settings": self._settings,
            }
            spec_fd = self._keep(write_spec(spec))
            inherited = (spec_fd, coordinator, lifeline[1], board, stacks, *plans.all())
            inherited += replies.all()
            commands.append(([sys.executable, "-P", "-m", module, str(spec_fd)], inherited))
        self._processes.spawn(commands, child_environment(directory), output, lifeline[0])
        for fd in lifeline:  # from now on only the workers hold its writing end
            self._processes.descriptors.remove(fd)
            os.close(fd)
        self._poll = select.poll()
        self._pidfds = {self._keep(os.pidfd_open(pid)) for pid in self.pids}
        for fd in (*self._pidfds, *(reader.fileno() for reader in self._inbox.readers)):
            self._poll.register(fd, select.POLLIN)
        self.watch = Watch(timeouts, self._board)

    def _keep(self, fd: int) -> int:
        """Record a descriptor that has to be closed, and return it."""
        self._processes.descriptors.append(fd)
        return fd

    @property
    def phases(self) -> list[str]:
        """The phase that each rank reported last."""
        return self._inbox.phases

    @property
    def pids(self) -> list[int]:
        """The process id of each rank's worker."""
        return [process.pid for process in self._processes.processes]

    # ---- messages ----------------------------------------------------------------------------

    def send(self, kind: int, buffers: Sequence[Buffer], step: int | None = None) -> None:
        """Broadcast one record to every worker."""
        with self._processes.use():
            self.watch.note_sending(step)
            while not self._writer.try_send(kind, buffers):
                self._processes.refuse_if_ending()
                if self._some_worker_ended(0.0):
                    self._fail_with_cause()
                if self.watch.remaining_s() <= 0:
                    self._fail_hung("took a record")
                wait_readable(self._writer.fileno(), 0.1)

    def send_control(self, message: dict[str, Any]) -> None:
        self.send(CONTROL, [json.dumps(message).encode()])

    def receive(self, rank: int, kind: int) -> Record:
        """Sleep until the next record of `kind` comes from `rank` or a worker fails; return it."""
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
        """Sleep until one of `fds` is readable or a worker fails. No step may be in flight."""
        with self._processes.use():
            for fd in fds:
                self._poll.register(fd, select.POLLIN)
            try:
                while (ready := self._wait_for_events(timeout_s=None)).isdisjoint(fds):
                    self._collect()  # a worker sends its error report before it ends
                    if self._inbox.error_reports or ready & self._pidfds:
                        self._fail_with_cause()
            finally:
                for fd in fds:
                    self._poll.unregister(fd)

    def note_ready(self) -> None:
        """Record that every worker is ready."""
        self.phases[:] = ["ready"] * self.world_size

    def health(self) -> list[dict[str, Any]]:
        """Return rank, pid, last phase and whether the process is alive, for each rank."""
        return [
            {"rank": rank, "pid": process.pid, "phase": phase, "alive": process.poll() is None}
            for rank, (process, phase) in enumerate(
                zip(self._processes.processes, self.phases, strict=True)
            )
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
        # RuntimeError: another thread uses the ring and waits for a step, so the workers are killed
        with suppress(RuntimeError), self._processes.use():
            is_sent = self._writer.try_send(CONTROL, [json.dumps({"type": "shutdown"}).encode()])
        self._processes.release(CLOSE_TIMEOUT_S if is_sent else 0.0)

    def kill(self) -> None:
        """Kill the workers at once."""
        self._processes.release()

    def _some_worker_ended(self, timeout_s: float) -> bool:
        """Sleep until a descriptor is readable or the time is over; return whether a worker ended.

        Raises:
            RuntimeError: the group is closed.
        """
        return not self._pidfds.isdisjoint(self._wait_for_events(timeout_s))

    def _wait_for_events(self, timeout_s: float | None) -> set[int]:
        events = self._poll.poll(None if timeout_s is None else timeout_s * 1e3)
        self._processes.refuse_if_ending()
        return {fd for fd, _ in events}

    # ---- failing -----------------------------------------------------------------------------

    def _fail_with_cause(self) -> NoReturn:
        """Wait a moment for the rank that failed first, kill all workers and raise its error."""
        exit_codes = wait_for_exits(self._processes.processes, self._inbox)
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
        return examine(self.pids, self.phases, self._board, self._stack_fds)

    def _fail(self, ranks: list[RankState], failure: Failure) -> NoReturn:
        self.kill()
        raise failure.to_error(ranks, self.watch, self._settings)
