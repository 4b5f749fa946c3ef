"""The coordinator: it takes requests, plans steps one ahead of the GPUs, and returns tokens.

It exchanges only plain data with its callers (`AddRequest`, request ids to abort, `RequestUpdate`).
It can therefore run inside the caller's process, as `LLM` does, or in a separate process, as
`AsyncLLM` does.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import xxhash

from tpllm.channel.step_plan import MASKS, RESULT, STEP, StepResult
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.grammars import Grammars
from tpllm.engine.request import AddRequest, RequestUpdate, Sequence
from tpllm.engine.request_checks import check_first_tokens, check_request
from tpllm.engine.scheduler import Scheduler, SchedulerStats
from tpllm.engine.stats import EngineStats, StepHistogram
from tpllm.engine.transport import Transport
from tpllm.errors import SettingError

# One step runs while the next is planned and sent. With more steps in flight, more tokens would be
# computed after an end token and dropped.
MAX_STEPS_IN_FLIGHT = 2


@dataclass
class HostTimes:
    """Seconds that the coordinator has spent on each of its tasks."""

    schedule_s: float = 0.0
    broadcast_s: float = 0.0
    wait_s: float = 0.0  # waiting for results: the coordinator is faster than the GPUs
    collect_s: float = 0.0


class Coordinator:
    """One engine: a scheduler, its blocks, and the workers that compute.

    Args:
        config: the engine's settings
        workers: the workers, already started; the coordinator ends them
        grammars: compiles the grammars of structured outputs

    Raises:
        SettingError: the settings leave no room for a KV cache.
        WorkerError: a worker failed, at start or later; all processes of the engine have ended.
    """

    def __init__(self, config: EngineConfig, workers: Transport, grammars: Grammars) -> None:
        self.config = config
        self._workers = workers
        self._grammars = grammars
        self.times = HostTimes()
        try:
            replies = [workers.receive_control(rank) for rank in range(workers.world_size)]
            self.num_kv_blocks: int = replies[0]["num_kv_blocks"]
            self.worker_info: dict[str, Any] = replies[0]["info"]
            workers.note_ready()
            self._blocks = BlockManager(
                self.num_kv_blocks, config.kv_block_size, config.enable_prefix_caching
            )
            self.max_total_tokens = self._fit_max_model_len()
        except BaseException:
            workers.kill()
            raise
        self._scheduler = Scheduler(self._blocks, config.plan_limits)
        self._step_times = StepHistogram()
        self._num_requests = 0

    def _fit_max_model_len(self) -> int:
        """Return the most tokens of a sequence: max_model_len, or fewer if the cache is smaller.

        Raises:
            SettingError: the caller set max_model_len to more than the cache holds.
        """
        length = self.config.max_model_len
        capacity = self._blocks.num_usable_blocks * self.config.kv_block_size
        if capacity < length and self.config.max_model_len_is_asked_for:
            raise SettingError(
                f"max_model_len={length} is more than the {capacity} tokens that the KV cache "
                f"holds ({self._blocks.num_usable_blocks} blocks of {self.config.kv_block_size}); "
                "lower it, or raise num_kv_blocks or gpu_memory_utilization"
            )
        return min(length, capacity)

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_unfinished

    @property
    def num_in_flight(self) -> int:
        """Steps sent whose results have not come back; `step` receives the oldest result."""
        return self._scheduler.num_in_flight

    @property
    def closed(self) -> bool:
        return self._workers.closed

    @property
    def worker_pids(self) -> list[int]:
        """The process id of each rank's worker."""
        return self._workers.pids

    def check(self, request: AddRequest) -> None:
        """Raise an error for a request that can never run. Call it before `add`.

        Raises:
            ValueError: the error names what is wrong with the prompt or its sampling parameters.
        """
        capacity = f"{self._blocks.num_usable_blocks} blocks of {self.config.kv_block_size}"
        check_request(request, self.config, self.max_total_tokens, capacity)
        if (params := request.sampling_params.structured_outputs) is not None:
            check_first_tokens(request, self._grammars.compile(params).first_mask)

    def add(self, requests: list[AddRequest]) -> None:
        """Queue requests that `check` has accepted; later calls of `step` return their tokens."""
        for request in requests:
            seed, outputs = request.sampling_params.seed, request.sampling_params.structured_outputs
            if seed is None:  # equal prompts must not be sampled with equal noise
                seed = xxhash.xxh64_intdigest(f"{self.config.seed}/{self._num_requests}".encode())
            self._num_requests += 1
            seq = Sequence(
                request,
                seed=seed % 2**64,
                eos_token_ids=self.config.model_config.eos_token_ids,
                max_total_tokens=self.max_total_tokens,
                grammar=None if outputs is None else self._grammars.compile(outputs),
            )
            self._scheduler.add(seq)

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """End requests. Their blocks become free as soon as no step in flight writes to them."""
        return self._scheduler.abort(request_ids)

    def step(self) -> list[RequestUpdate]:
        """Send steps ahead, wait for the oldest step in flight and return its updates.

        The list is empty after a step of prefill chunks alone, and if no request is left.

        An exception closes the engine, also one that a signal handler raises: planned, sent and
        recorded steps may differ then.
        """
        try:
            return self._step()
        except BaseException:
            self.kill()
            raise

    def _step(self) -> list[RequestUpdate]:
        times, scheduler, clock = self.times, self._scheduler, time.perf_counter
        while scheduler.num_in_flight < MAX_STEPS_IN_FLIGHT:
            begin = clock()
            plan = scheduler.schedule()
            planned = clock()
            times.schedule_s += planned - begin
            if plan is None:
                break
            self._workers.send(STEP, plan.buffers(), plan.step)
            self._step_times.note_sent(planned)
            times.broadcast_s += clock() - planned
            self._send_masks()
        if scheduler.num_in_flight == 0:
            assert scheduler.num_unfinished == 0, "requests are left that cannot be scheduled"
            return []
        begin = clock()
        record = self._workers.receive(0, RESULT)
        received = clock()
        self._step_times.note_result(received)
        updates = scheduler.finish(StepResult.decode(record.payload))
        self._send_masks()  # at once: the step in flight waits for its masks
        times.wait_s += received - begin
        times.collect_s += clock() - received
        return updates

    def _send_masks(self) -> None:
        masks = self._scheduler.take_masks()
        if masks is not None:
            self._workers.send(MASKS, masks.buffers())

    def sleep_until_readable(self, *fds: int) -> None:
        """Sleep until one of `fds` is readable or a worker fails, while no request is left."""
        self._workers.sleep_until_readable(*fds)

    def engine_stats(self) -> EngineStats:
        """Return counts and times of the running engine, as plain data."""
        blocks, scheduler = self._blocks, self._scheduler
        totals = asdict(scheduler.stats) | asdict(self.times)
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            kv_cache_usage=1 - blocks.num_free / blocks.num_usable_blocks,
            step_s=self._step_times.total_s,
            step_buckets=self._step_times.buckets(),
            health=self._workers.health(),
            **{each.name: totals[each.name] for each in fields(EngineStats) if each.name in totals},
        )

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes, as between two repeats of a benchmark."""
        self._blocks.reset_prefix_cache()

    def profile_decode(self, skip: int, num_steps: int) -> None:
        """Make rank 0 trace the kernels of `num_steps` decode steps, after `skip` others.

        The next `worker_times` returns the summary. This needs a GPU and CUDA graphs.
        """
        self._workers.send_control({"type": "profile", "skip": skip, "num_steps": num_steps})

    def worker_times(self, *, time_sampling: bool = False) -> dict[str, Any]:
        """Return rank 0's step times since the last call; see `tpllm.worker.step_times`.

        With `time_sampling`, workers that use CUDA graphs also capture and time a graph of sampling
        alone.
        """
        self._workers.send_control({"type": "step_times", "time_sampling": time_sampling})
        return self._workers.receive_control(0)

    def close(self) -> None:
        """Release all processes, shared memory and GPU memory. It may be called repeatedly."""
        self._grammars.close()
        self._workers.close()

    def kill(self) -> None:
        """Kill the workers instead of shutting them down: for an engine in an unknown state."""
        self._grammars.close()
        self._workers.kill()
