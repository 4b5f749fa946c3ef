"""The time of a decode step by kernel, from the GPU's own trace; the time of sampling alone."""

from collections import defaultdict
from typing import Any

import torch
from torch._C._autograd import DeviceType

from tpllm.channel.row_record import new_records, words_of
from tpllm.sampling.row_table import SampledRows, upload
from tpllm.worker.cuda_graphs import GraphPool
from tpllm.worker.model_runner import ModelRunner
from tpllm.worker.step_times import StepMarks

_NAME_LENGTH = 72
# A step begins with the kernel that gathers its inputs and ends before its tokens are copied.
_BEGIN, _END = "_gather_decode_inputs", "Memcpy DtoH"


class KernelProfile:
    """Traces `num_steps` decode steps after `skip` others, and totals their time by kernel.

    Tracing slows the host, so traced steps are not timed as a whole, and the time between two steps
    does not count as a gap.
    """

    def __init__(self, skip: int, num_steps: int) -> None:
        self._skip = skip
        self._num_steps = num_steps
        self._num_seen = 0
        self._num_rows = 0
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
        )
        self.summary: dict[str, Any] | None = None

    def before_step(self, num_rows: int) -> None:
        """Start the trace if it is due; call this before the launch of a step of `num_rows`."""
        if self._num_seen == self._skip:
            torch.cuda.synchronize()
            self._profiler.start()
        if self._num_seen >= self._skip:
            self._num_rows += num_rows
        self._num_seen += 1

    def after_step(self) -> None:
        """Stop the trace and make `summary` after the last traced step."""
        if self._num_seen == self._skip + self._num_steps:
            torch.cuda.synchronize()
            self._profiler.stop()
            self.summary = self._summarize()

    def _summarize(self) -> dict[str, Any]:
        """Return microseconds per step: of each kernel, of the whole step, and of gaps in it."""
        profiler: Any = self._profiler.profiler
        kernels = sorted(
            (event.start_ns(), event.duration_ns(), event.name())
            for event in profiler.kineto_results.events()
            if event.device_type() == DeviceType.CUDA
        )
        totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for _, duration, name in kernels:
            total = totals[name[:_NAME_LENGTH]]
            total[0] += 1
            total[1] += duration
        busy, gaps = busy_and_gaps(kernels)
        steps = self._num_steps
        by_kernel = sorted(totals.items(), key=lambda item: -item[1][1])
        return {
            "steps": steps,
            "rows": self._num_rows / steps,
            "step_us": round((busy + gaps) / steps / 1e3, 1),
            "gaps_us": round(gaps / steps / 1e3, 1),
            "kernels": [
                {"name": name, "calls": round(calls / steps, 2), "us": round(ns / steps / 1e3, 1)}
                for name, (calls, ns) in by_kernel[:20]
            ],
        }


def busy_and_gaps(kernels: list[tuple[int, int, str]]) -> tuple[int, int]:
    """Return the time in which kernels run, and the time inside steps in which none runs.

    Args:
        kernels: start, duration and name, sorted by start
    """
    busy, gaps, end = 0, 0, 0
    in_step = False
    for start, duration, name in kernels:
        busy += max(0, start + duration - max(start, end))
        if in_step and not name.startswith(_END):
            gaps += max(0, start - end)
        in_step = name.startswith(_BEGIN) or (in_step and not name.startswith(_END))
        end = max(end, start + duration)
    return busy, gaps


@torch.inference_mode()
def graph_sampling_ms(runner: ModelRunner, repeats: int = 20) -> float:
    """Return the milliseconds of LM head and sampling in the largest decode step.

    Events cannot be recorded inside a step's graph, so LM head and sampling are measured in a graph
    of their own. Every rank calls this together.
    """
    size, lm_head = runner.limits.max_num_seqs, runner.model.lm_head.weight
    rows = torch.full((size,), size, dtype=torch.int32, device=lm_head.device)  # padding
    hidden = torch.ones(size, lm_head.shape[1]).to(lm_head)
    records = new_records(size + 1)
    records["temperature"] = 1  # the slower case: noise for every id
    table = upload(words_of(records), lm_head.device)
    sampled = SampledRows(table, rows, torch.zeros_like(rows))
    graph = GraphPool().capture(lambda: runner.sample(runner.model.compute_logits(hidden), sampled))
    marks = StepMarks(lm_head.device)
    marks.begin()
    for _ in range(repeats):
        graph.replay()
    marks.end()
    marks.wait_end()
    return marks.spans_ms(None)[0] / repeats
