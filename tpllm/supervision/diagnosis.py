"""Finds out from outside what each worker is doing, for the report of a failure or a hang.

Only the stacks need the worker's cooperation: its signal handler writes them.
"""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from tpllm.channel.progress import STACK_SIGNAL, Board
from tpllm.supervision.child import kernel_state

ANSWER_S = 1.0  # the handler in C writes the stacks within milliseconds, if it runs at all
_POLL_S = 0.01
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device or disk, where no signal reaches it",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
}
_ENDED = "ended"


@dataclass(frozen=True)
class RankState:
    """The state of one rank at the time of a failure.

    Attributes:
        begun: the last step that it has begun, -1 for none
        launched: the last step that it has launched on its device
        state: the state of its process, in words
        stacks: Python stacks of its threads, as its signal handler wrote them; "" if it could not
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
        """Return the state in a line, followed by the stack of the main thread."""
        return f"rank {self.rank} {self._doing()}\n{self._where()}"

    def _doing(self) -> str:
        if self.phase != "ready":
            return f"is {self.state}, while {self.phase}"
        steps = "has begun no step" if self.begun < 0 else f"has begun step {self.begun}"
        if self.begun >= 0 and self.launched == self.begun:
            steps = f"has launched step {self.begun} on its device"
        return f"{steps} and is {self.state}"

    def _where(self) -> str:
        stack = main_stack(self.stacks)
        if stack:
            return stack
        return "  (it has ended)" if self.state == _ENDED else "  (its stack cannot be read)"


def examine(
    ranks: range,
    pids: Sequence[int],
    phases: Sequence[str],
    board: Board,
    stack_fds: Sequence[int],
) -> list[RankState]:
    """Return the state of this host's ranks. Stopped ones are continued to write their stacks.

    Call it only for workers that are killed afterwards: the signal ends a worker that has not
    installed its handler yet.

    Args:
        phases: the phase that each rank of the engine reported last; all else is of `ranks` only
    """
    states = [_state(pid) for pid in pids]
    for pid, state in zip(pids, states, strict=True):
        if state != _ENDED:
            with suppress(ProcessLookupError):
                os.kill(pid, STACK_SIGNAL)  # first, so that a stopped rank does nothing else
                os.kill(pid, signal.SIGCONT)
    _wait_for_stacks(pids, stack_fds)
    return [
        RankState(
            rank,
            pids[i],
            phases[rank],
            board.begun(i),
            board.launched(i),
            states[i],
            read_stacks(stack_fds[i]),
        )
        for i, rank in enumerate(ranks)
    ]


def rank_to_blame(ranks: Sequence[RankState]) -> int | None:
    """Return the rank that delays the others: the only one that is stopped, or that is behind."""
    stopped = [each.rank for each in ranks if each.is_stopped]
    if len(stopped) == 1:
        return stopped[0]
    steps = [(each.begun, each.launched) for each in ranks]
    behind = [each.rank for each in ranks if (each.begun, each.launched) == min(steps)]
    return behind[0] if len(behind) == 1 else None


def main_stack(stacks: str, max_frames: int = 12) -> str:
    """Return the frames of the thread that ran the signal handler, from the last stacks written."""
    blocks = [block for block in stacks.split("\n\n") if "(most recent call first)" in block]
    current = [block for block in blocks if block.startswith("Current thread")]
    if not current:
        return ""
    lines = current[-1].splitlines()[1:]
    frames = [line.rstrip() for line in lines if line.lstrip().startswith("File ")]
    return "\n".join(frames[:max_frames])


def read_stacks(fd: int) -> str:
    """Return what a rank has written into its file of stacks so far."""
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace").strip()


def _wait_for_stacks(pids: Sequence[int], fds: Sequence[int]) -> None:
    """Return when every rank has written its stacks or has ended, at the latest after ANSWER_S."""
    deadline = time.monotonic() + ANSWER_S
    before = [-1] * len(fds)
    while time.monotonic() < deadline:
        sizes = [os.fstat(fd).st_size for fd in fds]
        answered = (size or _state(pid) == _ENDED for pid, size in zip(pids, sizes, strict=True))
        if sizes == before and all(answered):
            return
        before = sizes
        time.sleep(_POLL_S)


def _state(pid: int) -> str:
    letter, _ = kernel_state(pid)
    return _ENDED if letter in "ZX" else _STATES.get(letter, f"in state {letter}")
