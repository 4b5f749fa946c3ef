"""How far the workers are with the steps they were sent, and how long they may still be silent."""

import time
from collections import deque
from typing import NamedTuple

from tpllm.channel.progress import Board

# So many steps may take as long as a phase of the start: they compile kernels and load libraries.
NUM_FIRST_STEPS = 16
_NUM_STEPS_TOLD = 16  # in a crash report


class Timeouts(NamedTuple):
    """Longest silence before the workers count as hung; see the settings of these names."""

    start_timeout_s: float
    step_timeout_s: float


class Watch:
    """Told of all that is sent to the workers, and of every sign of life that comes back.

    Attributes:
        step: the last step sent, -1 before the first
    """

    def __init__(self, timeouts: Timeouts, board: Board) -> None:
        self.timeouts = timeouts
        self.step = -1
        self._board = board
        self._sent: deque[tuple[int, float]] = deque()  # steps in flight, and when they were sent
        self._ended: deque[str] = deque(maxlen=_NUM_STEPS_TOLD)  # the last ones, in words
        self._num_results = 0
        self.note_life()

    def note_life(self) -> None:
        """Something has come from the workers, or something new has been asked of them."""
        self._alive_at = time.monotonic()
        if self._is_starting:
            self._beats = self._board.beats()

    def note_sending(self, step: int | None) -> None:
        """A record is about to be sent; `step` where it is one."""
        if not self._sent:
            self.note_life()  # whatever silence there was, nobody was expected to break it
        if step is not None:
            self.step = step
            self._sent.append((step, time.monotonic()))

    def note_result(self) -> None:
        """The oldest step in flight is done."""
        step, sent = self._sent.popleft() if self._sent else (-1, 0.0)
        self._ended.append(f"step {step}: {(time.monotonic() - sent) * 1e3:.1f} ms")
        self._num_results += 1

    @property
    def num_steps_in_flight(self) -> int:
        """Steps sent whose results have not come back."""
        return len(self._sent)

    def last_steps(self) -> list[str]:
        """What became of the last steps, in words."""
        return [*self._ended, *(f"step {step}: no result" for step, _ in self._sent)]

    @property
    def _is_starting(self) -> bool:
        return self._num_results < NUM_FIRST_STEPS

    @property
    def timeout_name(self) -> str:
        """The setting that bounds the present silence."""
        return "start_timeout_s" if self._is_starting else "step_timeout_s"

    @property
    def timeout_s(self) -> float:
        seconds: float = getattr(self.timeouts, self.timeout_name)
        return seconds

    def patience_s(self) -> float:
        """Seconds of silence that are left before the workers count as hung."""
        left_s = self._alive_at + self.timeout_s - time.monotonic()
        if left_s <= 0 and self._is_starting and self._board.beats() != self._beats:
            self.note_life()  # silent, but loading
            return self.timeout_s
        return left_s
