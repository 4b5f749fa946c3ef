"""EngineStats: counts and times of a running engine, as plain data; and how steps are timed."""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of a running engine. Counts and times are totals since its start.

    Attributes:
        num_waiting: requests that wait for room, including preempted ones
        num_running: requests in the batch
        kv_cache_usage: share of the KV cache's blocks that requests hold, 0 to 1
        num_preemptions: how often a request had to give its blocks to another one
        num_steps: steps planned
        num_prompt_tokens: prompt tokens of the admitted requests
        num_cached_tokens: prompt tokens that were found in the prefix cache
        num_generated_tokens: tokens sampled for requests that had not ended
        schedule_s, broadcast_s, wait_s, collect_s: time of the coordinator for planning steps,
            sending them, waiting for their results and processing these
        step_s: duration of the steps whose results have come
        step_buckets: durations of these steps in rising order: seconds, and how many steps took at
            most that long; the last pair is (infinity, number of steps)
        health: {"rank", "pid", "phase", "alive"} of each rank
    """

    num_waiting: int
    num_running: int
    kv_cache_usage: float
    num_preemptions: int
    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    schedule_s: float
    broadcast_s: float
    wait_s: float
    collect_s: float
    step_s: float
    step_buckets: list[tuple[float, int]]
    health: list[dict[str, Any]] = field(default_factory=list)


# from one decode row of a small model to the largest prefill chunk without a GPU
_BOUNDS_S = (
    *(0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008),
    *(0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)


class StepHistogram:
    """Counts every step in one bucket, so that no step is lost between two reads.

    A step begins at the result of the step before it, or when it is sent if no step was in flight.
    It ends at its own result. Counting a step costs 0.3 us.

    Attributes:
        total_s: duration of all steps together
    """

    def __init__(self) -> None:
        self.total_s = 0.0
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sent_s: deque[float] = deque()  # when each step in flight was sent
        self._last_result_s = -inf

    def note_sent(self, at_s: float) -> None:
        """Record the time at which a step was sent."""
        self._sent_s.append(at_s)

    def note_result(self, at_s: float) -> None:
        """Record the time at which the result of the oldest step in flight came."""
        begin_s = self._sent_s.popleft()
        if begin_s < self._last_result_s:
            begin_s = self._last_result_s
        self._last_result_s = at_s
        step_s = at_s - begin_s
        self.total_s += step_s
        self._counts[bisect_left(_BOUNDS_S, step_s)] += 1

    def buckets(self) -> list[tuple[float, int]]:
        """Return pairs in rising order: seconds, and how many steps took at most that long.

        The last pair is infinity and the number of all steps.
        """
        return list(zip((*_BOUNDS_S, inf), accumulate(self._counts), strict=True))
