"""What each worker is doing, asked from outside: for the report of a failure or a hang.

Nothing here needs a worker's cooperation but the stacks, and those only its signal handler.
"""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tpllm.channel.progress import STACK_SIGNAL, Board

ANSWER_S = 1.0  # a handler in C answers in milliseconds, if it can answer at all
_POLL_S = 0.01
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device or disk, deaf to signals",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
}
_ENDED = "ended"
_PF_EXITING = 4  # among the flags of a process, see proc_pid_stat(5)


@dataclass(frozen=True)
class RankState:
    """One rank as it was found.

    Attributes:
        begun: the last step that it has begun, -1 for none
        launched: the last step that it has handed to its device
        state: of its process, in words
        stacks: its threads' Python stacks, as it wrote them when asked or when it crashed; "" where
            it could not
    """

    rank: int
    pid: int
    phase: str
    begun: int
    launched: int
    state: str
    stacks: str

    @property
    def is_stopped(self) -> bool:
        return self.state in (_STATES["T"], _STATES["t"])

    def describe(self) -> str:
        """A line or more, with the stack of the main thread."""
        return f"rank {self.rank} {self._doing()}\n{self._where()}"

    def _doing(self) -> str:
        if self.phase != "ready":
            return f"is {self.state}, while {self.phase}"
        steps = "has begun no step" if self.begun < 0 else f"has begun step {self.begun}"
        if self.begun >= 0 and self.launched == self.begun:
            steps = f"has handed step {self.begun} to its device"
        return f"{steps} and is {self.state}"

    def _where(self) -> str:
        stack = main_stack(self.stacks)
        if stack:
            return stack
        return "  (it has ended)" if self.state == _ENDED else "  (it cannot tell its stack)"


def examine(
    pids: Sequence[int], phases: Sequence[str], board: Board, stack_fds: Sequence[int]
) -> list[RankState]:
    """The state of every rank, stacks included; stopped ranks go on for the moment it takes.

    Only for workers about to be killed: the question may end one that cannot answer yet.
    """
    states = [_state(pid) for pid in pids]
    for pid, state in zip(pids, states, strict=True):
        if state != _ENDED:
            with suppress(ProcessLookupError):
                os.kill(pid, STACK_SIGNAL)  # first, so that a stopped one does nothing else
                os.kill(pid, signal.SIGCONT)
    _await_answers(pids, stack_fds)
    return [
        RankState(
            rank,
            pids[rank],
            phases[rank],
            board.begun(rank),
            board.launched(rank),
            states[rank],
            read_stacks(stack_fds[rank]),
        )
        for rank in range(len(pids))
    ]


def rank_to_blame(ranks: Sequence[RankState]) -> int | None:
    """The rank that holds up the others: a stopped one, or the only one that is behind."""
    stopped = [each.rank for each in ranks if each.is_stopped]
    if len(stopped) == 1:
        return stopped[0]
    steps = [(each.begun, each.launched) for each in ranks]
    behind = [each.rank for each in ranks if (each.begun, each.launched) == min(steps)]
    return behind[0] if len(behind) == 1 else None


def main_stack(stacks: str, max_frames: int = 12) -> str:
    """The frames of the thread that the signal met, out of all threads' stacks: the last answer."""
    blocks = [block for block in stacks.split("\n\n") if "(most recent call first)" in block]
    current = [block for block in blocks if block.startswith("Current thread")]
    if not current:
        return ""
    lines = current[-1].splitlines()[1:]
    frames = [line.rstrip() for line in lines if line.lstrip().startswith("File ")]
    return "\n".join(frames[:max_frames])


def read_stacks(fd: int) -> str:
    """What a rank has written into its file of stacks so far."""
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace").strip()


def is_ending(pid: int) -> bool:
    """Whether the kernel is taking the process apart; how it ended is told only after that."""
    letter, flags = _stat(pid)
    return letter == "Z" or bool(flags & _PF_EXITING)


def _await_answers(pids: Sequence[int], fds: Sequence[int]) -> None:
    """Return once every rank has answered and come to rest, or has ended, or after ANSWER_S."""
    deadline = time.monotonic() + ANSWER_S
    before = [-1] * len(fds)
    while time.monotonic() < deadline:
        sizes = [os.fstat(fd).st_size for fd in fds]
        answered = (size or _state(pid) == _ENDED for pid, size in zip(pids, sizes, strict=True))
        if sizes == before and all(answered):
            return
        before = sizes
        time.sleep(_POLL_S)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process; not one that a debugger holds for a moment."""
    return _stat(pid)[0] == "T"


def _state(pid: int) -> str:
    letter, _ = _stat(pid)
    return _ENDED if letter in "ZX" else _STATES.get(letter, f"in state {letter}")


def _stat(pid: int) -> tuple[str, int]:
    """The kernel's letter for a process's state, "X" if it is gone, and its flags."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", 0
    fields = text.rpartition(") ")[2].split()
    return fields[0], int(fields[6])
