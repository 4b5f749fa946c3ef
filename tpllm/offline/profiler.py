"""Profiler: where an engine's time goes, for benchmarks."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tpllm.engine.coordinator import MAX_STEPS_IN_FLIGHT, Coordinator
from tpllm.engine.request import AddRequest

NUM_REFILL = MAX_STEPS_IN_FLIGHT + 1  # steps until the engine is one step ahead of the results


class Profiler:
    """Times the steps of an engine from its own start on. `LLM.profiler` makes one.

    No other thread may use the engine meanwhile.

    Attributes:
        engine_info: rank 0's GPU and the kernels that it uses
        num_kv_blocks: blocks of the KV cache that sequences can have
        max_total_tokens: most tokens of a sequence
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.engine_info = coordinator.worker_info
        self.num_kv_blocks = coordinator.num_kv_blocks - 1  # one is for padding
        self.max_total_tokens = coordinator.max_total_tokens
        self._host_times = replace(coordinator.times)
        coordinator.worker_times()  # they count from the last call on

    def step_times(self) -> dict[str, Any]:
        """Return milliseconds per step since the start.

        Decode steps and mixed ones have their steps on a worker apart; the coordinator's times are
        the mean of both. Sampling inside a CUDA graph is timed alone, at the largest batch.
        """
        workers = self._coordinator.worker_times(time_sampling=True)
        sampling_ms = workers.pop("graph_sampling_ms")
        workers.pop("kernels")
        num_steps = sum(kind["steps"] for kind in workers.values())
        figures: dict[str, Any] = {}
        for name, kind in workers.items():
            if steps := kind.pop("steps"):
                means = {field: round(total / steps, 4) for field, total in kind.items() if total}
                figures[name] = {"steps": int(steps)} | means
        if sampling_ms is not None:
            figures["graph_sampling_ms"] = round(sampling_ms, 4)
        for name, before_s in vars(self._host_times).items():
            seconds = getattr(self._coordinator.times, name) - before_s
            figures[name.removesuffix("_s") + "_ms"] = round(seconds * 1e3 / max(1, num_steps), 4)
        return figures

    def decode_kernels(
        self, run: Callable[[], object], skip: int, num_steps: int = 10
    ) -> dict[str, Any] | None:
        """Call `run`, and return the time by kernel of `num_steps` decode steps after `skip`.

        The times are rank 0's. None without CUDA graphs, or if `run` has fewer steps.
        """
        self._coordinator.profile_decode(skip, num_steps)
        run()
        kernels: dict[str, Any] | None = self._coordinator.worker_times()["kernels"]
        return kernels

    def decode_batch(self, requests: list[AddRequest]) -> "DecodeBatch":
        """Start requests without an end. The engine may have no others."""
        return DecodeBatch(self._coordinator, requests)


class DecodeBatch:
    """Requests that decode in lockstep, to time their steps."""

    def __init__(self, coordinator: Coordinator, requests: list[AddRequest]) -> None:
        self._coordinator = coordinator
        # numbers of tokens, in order of arrival
        self._prompts = {each.request_id: len(each.prompt_token_ids) for each in requests}
        self._outputs = dict.fromkeys(self._prompts, 0)
        coordinator.add(requests)

    @property
    def contexts(self) -> list[int]:
        """The number of tokens before each request's newest token."""
        return [self._prompts[name] + num_out - 1 for name, num_out in self._outputs.items()]

    def warm_up(self, num_tokens: int) -> None:
        """Return when every request has at least `num_tokens` tokens more than now."""
        goals = {name: num_out + num_tokens for name, num_out in self._outputs.items()}
        while any(self._outputs[name] < goal for name, goal in goals.items()):
            self._step()

    def time(self, num_steps: int) -> dict[str, float]:
        """Time `num_steps` steps and return milliseconds of a step.

        `step_ms` is the median from result to result, as a caller sees it. `gpu_ms` is the mean by
        the device's own clock; if it is lower, the host is the slower one.
        """
        self._coordinator.worker_times()  # the step in flight may end meanwhile
        for _ in range(NUM_REFILL):
            self._step()
        times_ms = []
        for _ in range(num_steps):
            begin = time.perf_counter()
            self._step()
            times_ms.append((time.perf_counter() - begin) * 1e3)
        decode = self._coordinator.worker_times()["decode"]
        figures = {"step_ms": statistics.median(times_ms)}
        if decode["steps"]:
            figures["gpu_ms"] = decode["gpu_ms"] / decode["steps"]
        return {name: round(value, 4) for name, value in figures.items()}

    def shrink(self, num_seqs: int) -> None:
        """Keep only the first `num_seqs` requests; the others have ended when this returns."""
        gone = list(self._outputs)[num_seqs:]
        self._coordinator.abort(gone)
        for _ in range(self._coordinator.num_in_flight):  # the steps that still hold them
            self._step()
        for name in gone:
            del self._outputs[name]

    def _step(self) -> None:
        for update in self._coordinator.step():
            self._outputs[update.request_id] += len(update.new_token_ids)
