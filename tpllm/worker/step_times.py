"""The time of a step on a worker: preparation on the host, computing, sampling, idling."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class _HostEvent:
    """An event on the host's clock, for a CPU: it works synchronously."""

    def record(self) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_HostEvent") -> float:
        return (end._time_s - self._time_s) * 1e3


class StepMarks:
    """Times of one step on the device's clock: its begin, the begin of sampling, its end.

    `wait_end` sleeps until the step is computed and its tokens are copied to the host.
    """

    def __init__(self, device: torch.device) -> None:
        make_event: Callable[[], Any] = _HostEvent
        if device.type == "cuda":
            # blocking: the waiting thread sleeps and does not hold the interpreter
            make_event = partial(torch.cuda.Event, enable_timing=True, blocking=True)
        self._begin, self._sample, self._end = make_event(), make_event(), make_event()
        self.is_decode = True
        self.has_sample = True  # False for a CUDA graph, which cannot contain a mark
        self.prepare_ms = 0.0

    def begin(self) -> None:
        self.has_sample = False
        self._begin.record()

    def sample(self) -> None:
        self.has_sample = True
        self._sample.record()

    def end(self) -> None:
        self._end.record()

    def wait_end(self) -> None:
        self._end.synchronize()

    def spans_ms(self, previous: "StepMarks | None") -> tuple[float, float, float]:
        """Return milliseconds of the step, of sampling, and of idling since `previous` ended."""
        idle_ms = previous._end.elapsed_time(self._begin) if previous else 0.0
        sample_ms = self._sample.elapsed_time(self._end) if self.has_sample else 0.0
        return self._begin.elapsed_time(self._end), sample_ms, idle_ms


class StepTimes:
    """Totals over steps, separately for decode and mixed steps."""

    FIELDS = ("prepare_ms", "gpu_ms", "sample_ms", "idle_ms")

    def __init__(self) -> None:
        self._previous: StepMarks | None = None
        self._totals = self._empty()

    def _empty(self) -> dict[str, dict[str, float]]:
        return {kind: dict.fromkeys(("steps", *self.FIELDS), 0.0) for kind in ("decode", "mixed")}

    def add(self, marks: StepMarks) -> None:
        gpu, sample, idle = marks.spans_ms(self._previous)
        self._previous = marks
        total = self._totals["decode" if marks.is_decode else "mixed"]
        total["steps"] += 1
        values = (marks.prepare_ms, gpu, sample, idle)
        for field, value in zip(self.FIELDS, values, strict=True):
            total[field] += value

    def take(self) -> dict[str, dict[str, float]]:
        """Return the totals since the last call, in milliseconds."""
        totals, self._totals = self._totals, self._empty()
        self._previous = None
        return totals
