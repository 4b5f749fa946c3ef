"""EngineStats: what an engine is doing, as plain data."""

from dataclasses import dataclass, field
from typing import Any

# What the coordinator and its scheduler count under the same names.
TOTALS = (
    "num_preemptions",
    "num_steps",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_generated_tokens",
    "schedule_s",
    "broadcast_s",
    "wait_s",
    "collect_s",
)


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A look into a running engine. Counts and times are totals since its start.

    Attributes:
        num_waiting: requests that wait for room, preempted ones included
        num_running: requests in the batch
        kv_cache_usage: share of the KV cache's blocks that requests hold, 0 to 1
        num_preemptions: times that a request gave its blocks to another
        num_steps: steps planned
        num_prompt_tokens: of the requests admitted
        num_cached_tokens: of these, found in the prefix cache
        num_generated_tokens: tokens drawn for requests that still ran
        schedule_s, broadcast_s, wait_s, collect_s: what the coordinator spent on planning steps,
            sending them, waiting for their results and taking these in
        step_s: what the steps took whose results have come
        step_buckets: of these, in rising order: seconds, and how many took at most so long; the
            last is (infinity, all)
        health: of each rank {"rank", "pid", "phase", "alive"}
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
