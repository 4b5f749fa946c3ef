"""Starts the workers, one process per rank, watches over them, and takes every one of them down.

A worker is `python -m tpllm.worker`: a fresh interpreter, so neither torchrun nor a main guard is
needed, and a notebook or a script read from standard input works. It inherits its ring descriptors
and a pidfd of this process, and reads everything else from an anonymous file. Whatever way this
process ends, the kernel kills the workers; whatever way a worker ends, this process sees the pidfd
it has of it; and where nobody ends and nothing comes, a deadline passes.
"""

import json
import os
import secrets
import select
import signal
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tpllm.channel.progress import Board, create_board
from tpllm.channel.ring import (
    Part,
    Record,
    RingDescriptors,
    RingReader,
    RingWriter,
    create_ring,
    wait_readable,
)
from tpllm.channel.step_plan import CONTROL, RESULT, PlanLimits
from tpllm.child_process import write_spec
from tpllm.engine.crash_report import write_report
from tpllm.engine.diagnosis import (
    RankState,
    examine,
    is_ending,
    main_stack,
    rank_to_blame,
    read_stacks,
)
from tpllm.engine.processes import (
    ChildProcesses,
    Command,
    child_environment,
    fill_standard_descriptors,
    how_it_ended,
    signal_name,
    stderr_or_null,
)
from tpllm.errors import SettingError, WorkerError
from tpllm.interrupts import Interrupts
from tpllm.resources import refuse_too_few_descriptors, refuse_too_little_room

CONTROL_BYTES = 1 << 16  # room for any control record; longer tracebacks are cut by the worker
CLOSE_TIMEOUT_S = 3.0
# After a first sign of trouble, how long to listen for its cause: peers of a dead rank complain.
GRACE_S = 0.5
ENDING_S = 2.0  # likewise, while a rank is on its way out: the driver may take a second for a GPU
_NUM_SLOTS = 8
# So many steps may take as long as a phase of the start: they compile kernels and load libraries.
NUM_FIRST_STEPS = 16
_NUM_STEPS_TOLD = 16  # in a crash report


class Timeouts(NamedTuple):
    """Longest silence before the workers count as hung; see the settings of these names."""

    start_timeout_s: float
    step_timeout_s: float


class _Cause(NamedTuple):
    """Why a rank failed, in a sentence and in the attributes of WorkerError."""

    rank: int | None  # None where no single one is to blame
    text: str
    cause: str
    signal: int | None = None
    remote_traceback: str | None = None


class _Complaint(NamedTuple):
    """What a worker said of its failure."""

    time: float  # time.monotonic(), one clock for all processes
    rank: int
    text: str
    is_setting: bool  # it is about a setting: the text alone tells the caller everything


class WorkerGroup:
    """The worker processes of one engine and the rings between them and the coordinator.

    One ring carries plans and control records to all workers; each worker has a ring of its own
    back, on which rank 0 also sends the results of steps.

    Args:
        world_size: number of workers.
        limits: the size of the largest step, for which the rings are made.
        settings: plain data that every worker is started with, as JSON.
        timeouts: after how much silence the workers are taken down.
        module: what a worker runs; tests put a stand-in here.

    Raises:
        WorkerError: by any method, when a worker has failed; every process is gone by then.
        SettingError: a worker refused a setting; likewise. Or this host is out of something.
        RuntimeError: the group has been closed, also by another thread in the middle of a call.
    """

    def __init__(
        self,
        world_size: int,
        limits: PlanLimits,
        settings: dict[str, Any],
        timeouts: Timeouts,
        module: str = "tpllm.worker",
    ) -> None:
        self.world_size = world_size
        self._settings = settings
        self._timeouts = timeouts
        self.step = -1  # the last step sent: for messages
        self.phases = ["starting"] * world_size  # what each rank said last
        self._inbox: deque[tuple[int, Record]] = deque()  # received, and not asked for yet
        self._complaints: list[_Complaint] = []
        self._num_results = 0
        self._sent: deque[tuple[int, float]] = deque()  # steps in flight, and when they were sent
        self._last_steps: deque[str] = deque(maxlen=_NUM_STEPS_TOLD)  # in words
        self._processes = ChildProcesses(os.getpid())
        # runs at garbage collection and at the interpreter's exit, whichever comes first
        self._finalizer = weakref.finalize(self, self._processes.release)
        try:
            with Interrupts():  # what has been made, but not yet noted, could not be given back
                self._start(limits, settings, module)
        except BaseException:
            self._processes.release()
            raise

    def _start(self, limits: PlanLimits, settings: dict[str, Any], module: str) -> None:
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
        # only a name, which nobody can guess: the workers make it, so that it is never there before
        # the guard that removes it, should this process be killed
        directory = Path(tempfile.gettempdir()) / f"tpllm-{secrets.token_hex(8)}"
        self._processes.directory = directory
        self._readers: list[RingReader] = []
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
            self._readers.append(RingReader(replies, 0))
            self._processes.channels.append(self._readers[rank])
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
                "plans": _as_json(plans),
                "replies": _as_json(replies),
                "settings": settings,
            }
            spec_fd = self._keep(write_spec(spec))
            inherited = (spec_fd, coordinator, lifeline[1], board, stacks, *plans.all())
            inherited += replies.all()
            commands.append(([sys.executable, "-P", "-m", module, str(spec_fd)], inherited))
        self._processes.spawn(commands, child_environment(directory), output, lifeline[0])
        for fd in lifeline:  # from now on the workers alone hold its writing end
            self._processes.descriptors.remove(fd)
            os.close(fd)
        self._poll = select.poll()
        self._watched: dict[int, int] = {}  # pidfd -> rank
        for rank, process in enumerate(self._processes.processes):
            pidfd = self._keep(os.pidfd_open(process.pid))
            self._watched[pidfd] = rank
            self._poll.register(pidfd, select.POLLIN)
            self._poll.register(self._readers[rank].fileno(), select.POLLIN)
        self._note_life()

    def _keep(self, fd: int) -> int:
        """Note a descriptor that has to be given back."""
        self._processes.descriptors.append(fd)
        return fd

    @property
    def pids(self) -> list[int]:
        """The process id of each rank's worker."""
        return [process.pid for process in self._processes.processes]

    # ---- talking -----------------------------------------------------------------------------

    def send(self, kind: int, parts: Sequence[Part], step: int | None = None) -> None:
        """Broadcast one record to every worker."""
        with self._processes.use():
            if self.num_steps_in_flight == 0:
                self._note_life()  # whatever silence there was, nobody was expected to break it
            if step is not None:
                self.step = step
                self._sent.append((step, time.monotonic()))
            while not self._writer.try_send(kind, parts):
                self._processes.refuse_if_ending()
                if self._some_worker_ended(timeout_s=0.0):
                    self._fail_with_cause()
                if self._patience_s() <= 0:
                    self._fail_hung("took a record")
                wait_readable(self._writer.fileno(), 0.1)

    def send_control(self, message: dict[str, Any]) -> None:
        self.send(CONTROL, [json.dumps(message).encode()])

    def receive(
        self, rank: int, kind: int, on_phase: Callable[[int, str], None] | None = None
    ) -> Record:
        """The next record of `kind` from `rank`; sleeps until it comes or a worker fails.

        `on_phase(rank, phase)` hears what the workers say of their progress meanwhile.
        """
        with self._processes.use():
            while True:
                for item in self._inbox:
                    if item[0] == rank and item[1].kind == kind:
                        self._inbox.remove(item)
                        if kind == RESULT:
                            self._note_result()
                        return item[1]
                # only now: what had come before somebody failed is not lost
                if self._complaints:
                    self._fail_with_cause()
                if self._collect(on_phase):
                    continue
                patience_s = self._patience_s()
                if patience_s <= 0:
                    self._fail_hung("said anything" if self.step < 0 else "answered")
                # a worker's last words come before its end
                if self._some_worker_ended(patience_s) and not self._collect(on_phase):
                    self._fail_with_cause()

    def _collect(self, on_phase: Callable[[int, str], None] | None) -> bool:
        """Move what has come into the inbox; False where nothing has."""
        any_came = False
        for rank, reader in enumerate(self._readers):
            while (record := reader.try_receive()) is not None:
                any_came = True
                self._take(rank, record, on_phase)
        if any_came:
            self._note_life()
        return any_came

    def _take(
        self, rank: int, record: Record, on_phase: Callable[[int, str], None] | None = None
    ) -> None:
        message = json.loads(record.payload.tobytes()) if record.kind == CONTROL else {}
        if "error" in message:
            complaint = _Complaint(message["time"], rank, message["error"], message["setting"])
            self._complaints.append(complaint)
        elif "phase" in message:
            self.phases[rank] = message["phase"]
            if on_phase:
                on_phase(rank, message["phase"])
        else:
            self._inbox.append((rank, record))

    def receive_control(
        self, rank: int, on_phase: Callable[[int, str], None] | None = None
    ) -> dict[str, Any]:
        record = self.receive(rank, CONTROL, on_phase)
        message: dict[str, Any] = json.loads(record.payload.tobytes())
        return message

    def sleep_until_readable(self, *fds: int) -> None:
        """Sleep while nothing runs, until one of `fds` can be read or a worker fails."""
        with self._processes.use():
            for fd in fds:
                self._poll.register(fd, select.POLLIN)
            try:
                while (ready := self._wait_for_events(timeout_s=None)).isdisjoint(fds):
                    self._collect(None)  # a worker's last words come before its end
                    if self._complaints or ready & self._watched.keys():
                        self._fail_with_cause()
            finally:
                for fd in fds:
                    self._poll.unregister(fd)

    def health(self) -> list[dict[str, Any]]:
        """Of each rank: its rank and pid, what it said last that it does, whether it lives."""
        return [
            {"rank": rank, "pid": process.pid, "phase": phase, "alive": process.poll() is None}
            for rank, (process, phase) in enumerate(
                zip(self._processes.processes, self.phases, strict=True)
            )
        ]

    # ---- patience ----------------------------------------------------------------------------

    def _note_life(self) -> None:
        """Something has come from the workers, or something new has been asked of them."""
        self._alive_at = time.monotonic()
        if self._is_starting:
            self._beats = self._board.beats()

    def _note_result(self) -> None:
        step, sent = self._sent.popleft() if self._sent else (-1, 0.0)
        self._last_steps.append(f"step {step}: {(time.monotonic() - sent) * 1e3:.1f} ms")
        self._num_results += 1

    @property
    def num_steps_in_flight(self) -> int:
        """Steps sent whose results have not come back."""
        return len(self._sent)

    @property
    def _is_starting(self) -> bool:
        return self._num_results < NUM_FIRST_STEPS

    @property
    def _timeout_name(self) -> str:
        return "start_timeout_s" if self._is_starting else "step_timeout_s"

    def _patience_s(self) -> float:
        """Seconds of silence that are left before the workers count as hung."""
        timeout_s: float = getattr(self._timeouts, self._timeout_name)
        left_s = self._alive_at + timeout_s - time.monotonic()
        if left_s <= 0 and self._is_starting and self._board.beats() != self._beats:
            self._note_life()  # silent, but loading
            return timeout_s
        return left_s

    # ---- ending ------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._processes.released.is_set()

    def close(self) -> None:
        """Ask the workers to end, then see to it. Harmless when repeated, or in a forked copy."""
        if self.closed or os.getpid() != self._processes.owner_pid:
            return
        asked = False
        # in use by another thread, which waits for a step: then there is nobody to ask
        with suppress(RuntimeError), self._processes.use():
            asked = self._writer.try_send(CONTROL, [json.dumps({"type": "shutdown"}).encode()])
        self._processes.release(CLOSE_TIMEOUT_S if asked else 0.0)

    def kill(self) -> None:
        """End the workers at once."""
        self._processes.release()

    def _some_worker_ended(self, timeout_s: float) -> bool:
        """Sleep until a worker ends or says something, or the time is over; whether one has ended.

        Raises:
            RuntimeError: it ended because the group is being closed.
        """
        return not self._watched.keys().isdisjoint(self._wait_for_events(timeout_s))

    def _wait_for_events(self, timeout_s: float | None) -> set[int]:
        """Sleep until some descriptors have something; which ones."""
        events = self._poll.poll(None if timeout_s is None else timeout_s * 1e3)
        self._processes.refuse_if_ending()
        return {fd for fd, _ in events}

    def _fail_with_cause(self) -> NoReturn:
        """Listen a moment for the rank that failed first, take everything down, raise.

        A rank that ended without a word explains the complaints of the others, never the other way
        round, but for SIGABRT: that is also how NCCL ends a process that has lost its peers.
        """
        begin = time.monotonic()
        while True:
            codes = [process.poll() for process in self._processes.processes]
            for rank, reader in enumerate(self._readers):
                while (record := reader.try_receive()) is not None:
                    self._take(rank, record)
            told = {complaint.rank for complaint in self._complaints}
            silent = {  # rank -> exit code
                rank: code
                for rank, code in enumerate(codes)
                if code is not None and rank not in told
            }
            aborted = [rank for rank, code in silent.items() if code == -signal.SIGABRT]
            ending = any(
                code is None and rank not in told and is_ending(self.pids[rank])
                for rank, code in enumerate(codes)
            )
            is_explained = len(silent) > len(aborted) or (aborted and told and not ending)
            patience_s = ENDING_S if ending else GRACE_S
            if is_explained or time.monotonic() > begin + patience_s:
                break
            time.sleep(0.01)
        self._processes.refuse_if_ending()
        silent = dict(sorted(silent.items(), key=lambda item: item[1] == -signal.SIGABRT))
        causes = [self._describe_end(rank, code) for rank, code in silent.items()]
        if self._complaints:
            first = min(self._complaints)
            if first.is_setting and not silent:
                self.kill()
                raise SettingError(first.text)
            text = f"worker rank {first.rank} failed {self._when(first.rank)}:\n{first.text}"
            blamed = _Cause(first.rank, text, first.text.splitlines()[-1], None, first.text)
            causes.insert(len(causes) - len(aborted), blamed)
        ranks = self._examine()
        self._fail("\n".join(each.text for each in causes), causes[0], ranks)

    def _fail_hung(self, what: str) -> NoReturn:
        """Say where every rank is, take everything down, raise."""
        name = self._timeout_name
        ranks = self._examine()
        rank = rank_to_blame(ranks)
        who = "the workers hang" if rank is None else f"worker rank {rank} hangs"
        when = self._when(0 if rank is None else rank)
        text = (
            f"{who} {when}: none {what} for {name}={getattr(self._timeouts, name):g}; raise "
            f"{name} if work may take that long\n" + "\n".join(each.describe() for each in ranks)
        )
        stacks = None if rank is None else ranks[rank].stacks
        self._fail(text, _Cause(rank, text, "hang", None, stacks), ranks)

    def _examine(self) -> list[RankState]:
        return examine(self.pids, self.phases, self._board, self._stack_fds)

    def _describe_end(self, rank: int, code: int) -> _Cause:
        how, usual_reason = how_it_ended(code)
        text = f"worker rank {rank} {how} {self._when(rank)}; {usual_reason}"
        if code >= 0:
            return _Cause(rank, text, f"exit code {code}")
        stacks = read_stacks(self._stack_fds[rank])
        if stack := main_stack(stacks):
            text += f"\n{stack}"
        return _Cause(rank, text, signal_name(-code), -code, stacks or None)

    def _when(self, rank: int) -> str:
        phase = self.phases[rank]
        if phase != "ready":
            return f"while {phase}"
        if self.step < 0:
            return "while idle"
        moment = "in" if self.num_steps_in_flight else "while idle after"
        return f"{moment} step {self.step}"

    def _fail(self, message: str, cause: _Cause, ranks: list[RankState]) -> NoReturn:
        self.kill()
        phase = None if cause.rank is None else self.phases[cause.rank]
        last_steps = [*self._last_steps, *(f"step {step}: no result" for step, _ in self._sent)]
        report = write_report(message, self._settings, last_steps, ranks)
        raise WorkerError(
            message if report is None else f"{message}\nA crash report is in {report}",
            rank=cause.rank,
            phase=phase,
            step=self.step if self.step >= 0 else None,
            cause=cause.cause,
            signal=cause.signal,
            remote_traceback=cause.remote_traceback,
            report=report,
        )


def _as_json(ring: RingDescriptors) -> list[Any]:
    return [ring.memory, list(ring.ready), ring.freed]
