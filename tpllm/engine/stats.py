"""EngineStats: counts and times of a running engine, as plain data."""

from dataclasses import dataclass, field
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
