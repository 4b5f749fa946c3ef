"""A worker: it starts one rank, and executes step plans until it receives `shutdown`."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from tpllm.channel.progress import Progress
from tpllm.channel.ring import RingReader
from tpllm.channel.step_plan import CONTROL, MASKS, StepMasks, StepPlan
from tpllm.config.engine_config import EngineConfig
from tpllm.layers.all_reduce.trial import copy_streams_work, peer_memory_works
from tpllm.layers.attention.attention import AttentionBackend, make_backend
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.matmul import fast_matmul, plain_matmul
from tpllm.layers.weights import WeightSource
from tpllm.models.checkpoint_weights import DummyWeights, SafetensorsWeights
from tpllm.models.decoder import Decoder, make_model
from tpllm.parallel.collectives import barrier, with_copy_streams, with_peer_memory
from tpllm.parallel.copy_streams import NUM_COPY_STREAMS
from tpllm.parallel.group import TPGroup
from tpllm.worker.cache_sizing import cpu_cache_blocks, gpu_cache_blocks
from tpllm.worker.finite_weights import check_weights_are_finite
from tpllm.worker.kernel_profile import KernelProfile, graph_sampling_ms
from tpllm.worker.kv_cache import CacheShape
from tpllm.worker.memory import explained_out_of_memory
from tpllm.worker.micro_batches import micro_batch_threshold
from tpllm.worker.model_runner import ModelRunner
from tpllm.worker.replies import Replies
from tpllm.worker.results import ResultSender
from tpllm.worker.step_times import StepMarks, StepTimes
from tpllm.worker.warm_up import KernelWarmUp

# While steps are in flight the next plan arrives within this time: spin instead of sleeping.
SPIN_S = 100e-6


class Worker:
    """One rank of the engine.

    Raises:
        SettingError: the model and a cache do not fit in the memory that the settings allow.
    """

    def __init__(
        self, spec: dict[str, Any], plans: RingReader, replies: Replies, progress: Progress
    ) -> None:
        self._plans, self._replies, self._progress = plans, replies, progress
        config = self._config = EngineConfig.from_json(spec["settings"]["config"])
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        device = self._device = _take_device(config, spec["device"], spec["local_world_size"])
        rank, world_size, on_gpu = spec["rank"], spec["world_size"], device.type == "cuda"
        free_at_start = torch.cuda.mem_get_info()[0] if on_gpu else 0
        self._warm_up = KernelWarmUp(config, rank, world_size, device) if on_gpu else None

        replies.phase("joining the group")
        self._tp = _join_group(spec, config, device, self._dtype)
        replies.phase("loading weights")
        begin = time.perf_counter()
        matmul = plain_matmul if config.disable_custom_matmul else fast_matmul(self._dtype, device)
        backend = make_backend(config.attention_backend)
        context = LayerContext(self._tp, self._dtype, matmul, backend)
        with explained_out_of_memory(device, "while it loaded the weights"):
            model = self._load_model(context)
        load_s = time.perf_counter() - begin
        self._use_graphs = on_gpu and backend.capturable and not config.enforce_eager
        self._runner = self._make_runner(model, backend)
        with explained_out_of_memory(device, "while it allocated the KV cache"):
            num_blocks = self._make_cache(model, free_at_start)

        self._marks, self._times = StepMarks(device), StepTimes()
        self._profile: KernelProfile | None = None
        self._results: ResultSender | None = None
        if rank == 0:
            self._results = ResultSender(replies, self._times, device, config.plan_limits)
        barrier(self._tp)
        info = self._info(context, load_s)
        replies.control({"type": "ready", "num_kv_blocks": num_blocks, "info": info})

    # ---- starting ----------------------------------------------------------------------------

    def _load_model(self, context: LayerContext) -> Decoder:
        config, model_config = self._config, self._config.model_config
        model = make_model(
            model_config.architecture,
            model_config.spec,
            context,
            # rounded up to whole blocks: the trial step is as long as a row's cache
            config.plan_limits.max_tokens_per_seq,
        )
        if config.load_format == "dummy":
            model.load(DummyWeights(model_config.spec, self._device, self._dtype))
        else:
            weights = _HeartbeatWeights(SafetensorsWeights(config.folder), self._progress)
            model.load(weights)
            check_weights_are_finite(model, weights, model_config.spec, self._dtype)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return model

    def _make_runner(self, model: Decoder, backend: AttentionBackend) -> ModelRunner:
        config, tp = self._config, self._tp
        padded = self._device.type == "cuda" and backend.capturable
        return ModelRunner(
            model,
            tp,
            config.plan_limits,
            config.model_config.vocab_size,
            padded_decode=padded,
            padded_mixed=padded and backend.prefill_capturable,
            micro_batch_threshold=(
                micro_batch_threshold(config, self._dtype) if tp.copy_streams else None
            ),
            receive_masks=self._receive_masks,
        )

    def _make_cache(self, model: Decoder, free_at_start: int) -> int:
        """Size and allocate the cache, capture graphs, and return the number of blocks."""
        config, runner = self._config, self._runner
        shape = CacheShape(
            model.num_layers,
            config.kv_block_size,
            model.local_num_kv_heads,
            model.head_dim,
            self._dtype,
        )
        self._replies.phase("measuring memory")
        if self._warm_up:
            self._warm_up.wait()
            torch.cuda.empty_cache()  # its memory does not count for the largest step
        if self._device.type == "cuda":
            num_blocks = gpu_cache_blocks(
                config, shape, runner, self._tp, free_at_start, self._use_graphs
            )
        else:
            num_blocks = config.num_kv_blocks or cpu_cache_blocks(config, shape, self._tp)
        runner.use_cache(shape.allocate(num_blocks, self._device))
        if self._use_graphs:
            self._replies.phase("capturing graphs")
            runner.capture_graphs(runner.graph_sizes)
        return num_blocks

    def _info(self, context: LayerContext, load_s: float) -> dict[str, Any]:
        on_gpu = self._device.type == "cuda"
        return {
            "attention": context.attention_backend.name,
            "matmul": context.matmul.name,
            "all_reduce": "peer memory" if self._tp.peers else "NCCL" if on_gpu else "Gloo",
            "micro_batch_threshold": self._runner.micro_batch_threshold,
            "load_s": round(load_s, 2),
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(self._device) if on_gpu else None,
        }

    # ---- serving -----------------------------------------------------------------------------

    def run(self) -> None:
        """Execute plans until the coordinator sends `shutdown`."""
        while True:
            record = self._plans.receive(spin_s=SPIN_S)
            assert record is not None
            if record.kind != CONTROL:
                plan = StepPlan.decode(record.payload)
                self._progress.begin(plan.step)
                with explained_out_of_memory(self._device, "in a step"):
                    self._run_step(plan)
                self._progress.launch(plan.step)
                continue
            message = json.loads(record.payload.tobytes())
            if message["type"] == "shutdown":
                return
            if message["type"] == "step_times":
                self._report_times(message["time_sampling"])
            elif message["type"] == "profile" and self._results and self._use_graphs:
                self._profile = KernelProfile(message["skip"], message["num_steps"])

    def _run_step(self, plan: StepPlan) -> None:
        begin = time.perf_counter()
        if self._results is None:
            self._runner.run(plan, self._marks)
            return
        profile = self._profile if plan.num_decode == plan.rows.size else None
        if profile:
            profile.before_step(plan.rows.size)
        readback = self._results.next_buffer()
        readback.receive(self._runner.run(plan, readback.marks))
        readback.marks.end()
        readback.marks.prepare_ms = (time.perf_counter() - begin) * 1e3
        self._results.send(plan, readback)
        if profile:
            profile.after_step()

    def _receive_masks(self, step: int) -> StepMasks:
        """Wait for the masks that the coordinator makes while this step's forward runs."""
        record = self._plans.receive(spin_s=SPIN_S)
        assert record is not None
        assert record.kind == MASKS, f"a record of kind {record.kind} before the masks of {step}"
        masks = StepMasks.decode(record.payload)
        assert masks.step == step, f"masks of step {masks.step}, expected step {step}"
        return masks

    def _report_times(self, time_sampling: bool) -> None:
        """Send the totals since the last report; only rank 0 sends them."""
        sampling_ms = None
        if time_sampling and self._use_graphs:
            sampling_ms = graph_sampling_ms(self._runner)
        if self._tp.rank == 0:
            report = {**self._times.take(), "graph_sampling_ms": sampling_ms}
            report["kernels"] = self._profile.summary if self._profile else None
            self._profile = None
            self._replies.control(report)


class _HeartbeatWeights:
    """A source of weights that sends a heartbeat for every tensor: a slow disk is not a hang."""

    def __init__(self, weights: WeightSource, progress: Progress) -> None:
        self._weights = weights
        self._progress = progress

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        self._progress.beat()
        return self._weights.read(name, rows, cols)


def _join_group(
    spec: dict[str, Any], config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> TPGroup:
    """Return the group of all ranks, with peer memory if it is allowed and works."""
    rank, world_size = spec["rank"], spec["world_size"]
    store = str(Path(spec["directory"]) / "rendezvous")
    # longer than the coordinator's timeouts, because its error reports where every rank is
    timeout_s = 2 * max(config.start_timeout_s, config.step_timeout_s)
    one_host = spec["local_world_size"] == world_size
    tp = TPGroup.connect(rank, world_size, device, store, timeout_s, one_host=one_host)
    return tp if config.disable_custom_all_reduce else _with_peer_memory(tp, config, dtype)


def _with_peer_memory(tp: TPGroup, config: EngineConfig, dtype: torch.dtype) -> TPGroup:
    """Return the group with peer memory if a trial of it succeeds; without it NCCL is used.

    Also adds copy streams, if steps can be large enough for micro-batches and a trial succeeds.
    """
    with_peers = with_peer_memory(tp, config.model_config.hidden_size, dtype)
    if not peer_memory_works(with_peers):
        return tp
    if not micro_batch_threshold(config, dtype):
        return with_peers
    with_streams = with_copy_streams(
        with_peers, -(-config.max_num_batched_tokens // NUM_COPY_STREAMS)
    )
    return with_streams if copy_streams_work(with_streams) else with_peers


def _take_device(config: EngineConfig, index: int, local_world_size: int) -> torch.device:
    """Return the rank's device after making it the current one: GPU `index`, or a share of the CPU.

    The ranks of this host divide its CPU cores.
    """
    torch.set_float32_matmul_precision("highest")  # float32 means float32: no TF32
    if config.device == "cuda":
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    return torch.device("cpu")
