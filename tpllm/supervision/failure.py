"""Why an engine failed, out of what its ranks said, how they ended and where they were found."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpllm.errors import WorkerError
from tpllm.supervision.child import UNKNOWN_EXIT_CODE, Child
from tpllm.supervision.crash_report import write_report
from tpllm.supervision.diagnosis import RankState, is_ending, main_stack, rank_to_blame
from tpllm.supervision.inbox import Complaint, Inbox
from tpllm.supervision.processes import how_it_ended, signal_name
from tpllm.supervision.watch import Watch

GRACE_S = 0.5  # to listen for causes
ENDING_S = 2.0  # likewise, while a rank is on its way out: the driver may take a second for a GPU


@dataclass(frozen=True)
class Failure:
    """What is to be told of a failure: a text, and the attributes of WorkerError."""

    text: str
    rank: int | None  # None where no single one is to blame
    cause: str
    signal: int | None = None
    remote_traceback: str | None = None

    def to_error(
        self, ranks: Sequence[RankState], watch: Watch, settings: Mapping[str, Any]
    ) -> WorkerError:
        """The error for the caller, after writing a crash report."""
        report = write_report(self.text, settings, watch.last_steps(), ranks)
        return WorkerError(
            self.text if report is None else f"{self.text}\nA crash report is in {report}",
            rank=self.rank,
            phase=None if self.rank is None else ranks[self.rank].phase,
            step=watch.step if watch.step >= 0 else None,
            cause=self.cause,
            signal=self.signal,
            remote_traceback=self.remote_traceback,
            report=report,
        )


def await_ends(processes: Sequence[Child], inbox: Inbox) -> dict[int, int]:
    """After a first sign of trouble, listen for what explains it: the ends without a word.

    Peers of such a rank complain, sometimes before its end is told.

    Returns:
        the exit codes of these ranks; empty where complaints are all there is
    """
    begin = time.monotonic()
    while True:
        codes = [process.poll() for process in processes]
        inbox.collect()  # a worker's last words come before its end
        told = {complaint.rank for complaint in inbox.complaints}
        quiet = {rank: code for rank, code in enumerate(codes) if rank not in told}
        silent = {rank: code for rank, code in quiet.items() if code is not None}
        ending = any(
            code is None and is_ending(processes[rank].pid) for rank, code in quiet.items()
        )
        if silent and (not all(map(_is_abort, silent.values())) or (told and not ending)):
            return silent
        if time.monotonic() > begin + (ENDING_S if ending else GRACE_S):
            return silent
        time.sleep(0.01)


def failure_of_hang(ranks: Sequence[RankState], watch: Watch, omission: str) -> Failure:
    """Say where every rank is. `omission` is what none did: "answered", for one."""
    rank = rank_to_blame(ranks)
    who = "the workers hang" if rank is None else f"worker rank {rank} hangs"
    name = watch.timeout_name
    text = (
        f"{who} {_when(ranks[rank or 0], watch)}: none {omission} for {name}={watch.timeout_s:g}; "
        f"raise {name} if work may take that long\n"
    )
    text += "\n".join(each.describe() for each in ranks)
    stacks = None if rank is None else ranks[rank].stacks
    return Failure(text, rank, "hang", remote_traceback=stacks)


def failure_of_ends(
    ranks: Sequence[RankState],
    watch: Watch,
    complaints: Sequence[Complaint],
    silent: Mapping[int, int],
) -> Failure:
    """The failure that explains the others, with all of them in its text.

    A rank that ended without a word explains the complaints of the others, never the other way
    round, but for SIGABRT: that is also how NCCL ends a process that has lost its peers.

    Args:
        silent: exit codes of the ranks that ended without a word
    """
    order = sorted(silent, key=lambda rank: _is_abort(silent[rank]))
    causes = [_end(ranks[rank], silent[rank], watch) for rank in order]
    if complaints:
        num_aborts = sum(map(_is_abort, silent.values()))
        first = min(complaints)
        text = f"worker rank {first.rank} failed {_when(ranks[first.rank], watch)}:\n{first.text}"
        told = Failure(text, first.rank, first.text.splitlines()[-1], remote_traceback=first.text)
        causes.insert(len(causes) - num_aborts, told)
    return replace(causes[0], text="\n".join(each.text for each in causes))


def _is_abort(exit_code: int) -> bool:
    """Whether it may be no cause, but NCCL's answer to the end of another rank."""
    return exit_code == -signal.SIGABRT


def _end(rank: RankState, code: int, watch: Watch) -> Failure:
    """Of a rank that ended without a word."""
    how, usual_reason = how_it_ended(code)
    text = f"worker rank {rank.rank} {how} {_when(rank, watch)}; {usual_reason}"
    if 0 <= code < UNKNOWN_EXIT_CODE:
        return Failure(text, rank.rank, f"exit code {code}")
    if stack := main_stack(rank.stacks):
        text += f"\n{stack}"
    if code == UNKNOWN_EXIT_CODE:
        cause = "exit status unknown"
        return Failure(text, rank.rank, cause, remote_traceback=rank.stacks or None)
    return Failure(text, rank.rank, signal_name(-code), -code, rank.stacks or None)


def _when(rank: RankState, watch: Watch) -> str:
    if rank.phase != "ready":
        return f"while {rank.phase}"
    if watch.step < 0:
        return "while idle"
    moment = "in" if watch.num_steps_in_flight else "while idle after"
    return f"{moment} step {watch.step}"
