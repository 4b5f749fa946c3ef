"""Tracks the steps that the workers were sent, and how long the workers may still be silent."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

# These steps may take as long as a phase of the start: they compile kernels and load libraries.
NUM_FIRST_STEPS = 16
_NUM_STEPS_REPORTED = 16  # steps in a crash report


class Timeouts(NamedTuple):
    """Longest silence before the workers count as hung; see the settings with these names."""

    start_timeout_s: float
    step_timeout_s: float


class Watch:
    """Records what is sent to the workers and what comes back, and computes the deadline.

    Args:
        beats: returns a counter that grows while a rank makes progress

    Attributes:
        step: the last step sent, -1 before the first
    """

    def __init__(self, timeouts: Timeouts, beats: Callable[[], int]) -> None:
        self.timeouts = timeouts
        self.step = -1
        self._count_beats = beats
        self._sent: deque[tuple[int, float]] = deque()  # steps in flight, and their time of sending
        self._ended: deque[str] = deque(maxlen=_NUM_STEPS_REPORTED)  # lines about the last steps
        self._num_results = 0
        self.note_activity()

    def note_activity(self) -> None:
        """Restart the deadline: something came from the workers, or was sent to idle workers."""
        self._active_at = time.monotonic()
        if self._is_starting:
            self._beats = self._count_beats()

    def note_sending(self, step: int | None) -> None:
        """Record that a record is about to be sent, and its number if it is a step."""
        if not self._sent:
            self.note_activity()  # idle workers were not expected to send anything
        if step is not None:
            self.step = step
            self._sent.append((step, time.monotonic()))

    def note_result(self) -> None:
        """Record that the result of the oldest step in flight came."""
        step, sent = self._sent.popleft() if self._sent else (-1, 0.0)
        self._ended.append(f"step {step}: {(time.monotonic() - sent) * 1e3:.1f} ms")
        self._num_results += 1

    @property
    def num_steps_in_flight(self) -> int:
        """Steps sent whose results have not come back."""
        return len(self._sent)

    def last_steps(self) -> list[str]:
        """Return a line about each of the last steps."""
        return [*self._ended, *(f"step {step}: no result" for step, _ in self._sent)]

    @property
    def _is_starting(self) -> bool:
        return self._num_results < NUM_FIRST_STEPS

    @property
    def timeout_name(self) -> str:
        """The setting that limits the current silence."""
        return "start_timeout_s" if self._is_starting else "step_timeout_s"

    @property
    def timeout_s(self) -> float:
        seconds: float = getattr(self.timeouts, self.timeout_name)
        return seconds

    def remaining_s(self) -> float:
        """Return the seconds of silence that are left before the workers count as hung."""
        left_s = self._active_at + self.timeout_s - time.monotonic()
        if left_s <= 0 and self._is_starting and self._count_beats() != self._beats:
            self.note_activity()  # silent, but making progress with loading
            return self.timeout_s
        return left_s
