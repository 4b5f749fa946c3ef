"""Finds out why an engine failed, from error reports, exit codes and states of its ranks."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpllm.errors import WorkerError
from tpllm.supervision.child import UNKNOWN_EXIT_CODE, how_it_ended, signal_name
from tpllm.supervision.crash_report import write_report
from tpllm.supervision.diagnosis import RankState, main_stack, rank_to_blame
from tpllm.supervision.host import Worker
from tpllm.supervision.inbox import ErrorReport, Inbox
from tpllm.supervision.watch import Watch

GRACE_S = 0.5  # to wait for further error reports and exit codes
ENDING_S = 2.0  # the same while a rank is ending: the driver may need a second to free a GPU


@dataclass(frozen=True)
class Failure:
    """A failure: its text and the attributes of its WorkerError."""

    text: str
    rank: int | None  # None if no single rank caused it
    cause: str
    signal: int | None = None
    remote_traceback: str | None = None

    def to_error(
        self, ranks: Sequence[RankState], watch: Watch, settings: Mapping[str, Any]
    ) -> WorkerError:
        """Write a crash report and return the error for the caller."""
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


def wait_for_exits(workers: Sequence[Worker], inbox: Inbox) -> dict[int, int]:
    """Wait for ranks that end without an error report, since their end is the cause of a failure.

    Their peers may report errors first, before the end of such a rank is known.

    Returns:
        the exit codes of the ranks that ended without an error report; empty if there are none
    """
    begin = time.monotonic()
    while True:
        codes = [worker.poll() for worker in workers]
        inbox.collect()  # a worker sends its error report before it ends
        reporting = {report.rank for report in inbox.error_reports}
        others = {rank: code for rank, code in enumerate(codes) if rank not in reporting}
        exit_codes = {rank: code for rank, code in others.items() if code is not None}
        ending = any(code is None and workers[rank].is_ending() for rank, code in others.items())
        only_aborts = all(map(_is_abort, exit_codes.values()))
        if exit_codes and (not only_aborts or (reporting and not ending)):
            return exit_codes
        if time.monotonic() > begin + (ENDING_S if ending else GRACE_S):
            return exit_codes
        time.sleep(0.01)


def failure_of_hang(ranks: Sequence[RankState], watch: Watch, expected: str) -> Failure:
    """Return the failure of a hang, with the state of every rank in its text.

    Args:
        expected: what no worker did in time, such as "answered"
    """
    rank = rank_to_blame(ranks)
    who = "the workers hang" if rank is None else f"worker rank {rank} hangs"
    name = watch.timeout_name
    text = (
        f"{who} {_when(ranks[rank or 0], watch)}: none {expected} for {name}={watch.timeout_s:g}; "
        f"raise {name} if work may take that long\n"
    )
    text += "\n".join(each.describe() for each in ranks)
    stacks = None if rank is None else ranks[rank].stacks
    return Failure(text, rank, "hang", remote_traceback=stacks)


def failure_of_exits(
    ranks: Sequence[RankState],
    watch: Watch,
    error_reports: Sequence[ErrorReport],
    exit_codes: Mapping[int, int],
) -> Failure:
    """Return the failure that caused the others, with all of them in its text.

    A rank that ended without an error report causes the errors that its peers report, and not the
    other way round. SIGABRT is the exception: NCCL ends a process with it that has lost its peers.

    Args:
        exit_codes: exit codes of the ranks that ended without an error report
    """
    order = sorted(exit_codes, key=lambda rank: _is_abort(exit_codes[rank]))
    causes = [_failure_of_exit(ranks[rank], exit_codes[rank], watch) for rank in order]
    if error_reports:
        num_aborts = sum(map(_is_abort, exit_codes.values()))
        first = min(error_reports)
        text = f"worker rank {first.rank} failed {_when(ranks[first.rank], watch)}:\n{first.text}"
        cause = first.text.splitlines()[-1]
        reported = Failure(text, first.rank, cause, remote_traceback=first.text)
        causes.insert(len(causes) - num_aborts, reported)
    return replace(causes[0], text="\n".join(each.text for each in causes))


def _is_abort(exit_code: int) -> bool:
    """Whether the exit may be a consequence: NCCL aborts a process that has lost its peers."""
    return exit_code == -signal.SIGABRT


def _failure_of_exit(rank: RankState, code: int, watch: Watch) -> Failure:
    """Return the failure of a rank that ended without an error report."""
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
