"""The runner: padded decode steps against steps of true size. On a GPU: graphs against eager steps
bit by bit, and half precision against float32.
"""

from dataclasses import replace
from itertools import chain
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.layers.attention.split_schedules import assert_every_token_is_in_one_split
from tests.marks import FOUR_GPUS
from tests.ranks import run_ranks
from tests.reference import shipped_greedy
from tpllm.channel.row_record import ROW
from tpllm.channel.step_plan import PlanLimits, StepMasks, StepResult
from tpllm.config.checkpoint import resolve_model
from tpllm.config.engine_config import EngineConfig
from tpllm.config.model_config import ModelConfig
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.request import AddRequest, Sequence
from tpllm.engine.scheduler import Scheduler
from tpllm.layers.attention.attention import AttentionBatch, KVCache, PrefillBatch, make_backend
from tpllm.layers.attention.split_schedule import BEGIN, END, SPLIT_WORDS, ContextSplit
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.matmul import fast_matmul
from tpllm.models.checkpoint_weights import SafetensorsWeights
from tpllm.models.decoder import Decoder, make_model
from tpllm.models.dense import SelfAttention
from tpllm.models.micro_batch import MicroBatch
from tpllm.parallel.collectives import with_copy_streams, with_peer_memory
from tpllm.parallel.group import TPGroup
from tpllm.sampling_params import SamplingParams
from tpllm.worker import batch_state, micro_batches, model_runner, step_inputs
from tpllm.worker.cuda_graphs import StepSize, decode_sizes, mixed_sizes
from tpllm.worker.kv_cache import CacheShape
from tpllm.worker.model_runner import ModelRunner
from tpllm.worker.step_inputs import StepInputs, upload_sizes
from tpllm.worker.step_times import StepMarks
from tpllm.worker.trial_step import largest_step, run_largest_steps
from tpllm.worker.worker import Worker

BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS = 256, 40, 20
# small steps, several of which run as two micro-batches
MICRO_BATCHED: dict[str, Any] = {"max_step_tokens": 48, "padded": False}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 9, "top_p": 0.8},
    {"repetition_penalty": 1.3, "logprobs": 2},
    {"logit_bias": {5: 3.0}, "min_tokens": 4, "stop_token_ids": list(range(100))},
    {"logprobs": 20, "prompt_logprobs": 1},
]


def backend_of(device: str, dtype: torch.dtype) -> str:
    if device == "cpu":
        return "torch"
    return "flash-attn" if dtype == torch.bfloat16 else "triton"


def shipped_model(
    device: str, dtype: torch.dtype, tp: TPGroup | None = None
) -> tuple[Decoder, TPGroup, ModelConfig]:
    folder = resolve_model(None)
    config = ModelConfig.from_folder(folder)
    tp = tp or TPGroup.single(torch.device(device))
    backend = make_backend(backend_of(device, dtype))
    matmul = fast_matmul(dtype, tp.device)
    context = LayerContext(tp, dtype, matmul, backend)
    model = make_model(config.architecture, config.spec, context, 1024)
    model.load(SafetensorsWeights(folder))
    return model, tp, config


def allocate_cache(model: Decoder, num_blocks: int, tp: TPGroup) -> list[KVCache]:
    shape = CacheShape(
        model.num_layers,
        BLOCK_SIZE,
        model.local_num_kv_heads,
        model.head_dim,
        model.lm_head.weight.dtype,
    )
    return shape.allocate(num_blocks, tp.device)


def no_masks(step: int) -> StepMasks:
    raise AssertionError(f"no row of step {step} waits for a mask")


def make_runner(
    model: Decoder,
    tp: TPGroup,
    limits: PlanLimits,
    *,
    padded: bool,
    micro_batch_threshold: int | None = None,
) -> ModelRunner:
    """Make a runner; if `padded`, it pads its steps as for graphs."""
    return ModelRunner(
        model,
        tp,
        limits,
        limits.vocab_size,
        padded_decode=padded,
        padded_mixed=padded,
        micro_batch_threshold=micro_batch_threshold,
        receive_masks=no_masks,
    )


def run_all(
    device: str,
    dtype: torch.dtype,
    tp: TPGroup | None = None,
    *,
    padded: bool = True,
    capture: bool = False,
    micro_batch_threshold: int | None = None,
    max_step_tokens: int = 512,
    prompts_alone: bool = False,
) -> tuple[dict[str, list[int]], Tensor]:
    """Return the tokens of every request, and the final cache without the reserved block."""
    model, tp, config = shipped_model(device, dtype, tp)
    limits = PlanLimits(
        MAX_SEQS, max_step_tokens, 4, BLOCK_SIZE, config.vocab_size, max_logprobs=20
    )
    runner = make_runner(
        model, tp, limits, padded=padded, micro_batch_threshold=micro_batch_threshold
    )
    caches = allocate_cache(model, NUM_BLOCKS, tp)
    runner.use_cache(caches)
    if capture:
        runner.capture_graphs(runner.graph_sizes)
    scheduler = Scheduler(BlockManager(NUM_BLOCKS, BLOCK_SIZE), limits)
    for i, reference in enumerate(shipped_greedy()[:MAX_SEQS]):
        options = {"max_tokens": 5 + i, **OPTIONS[i % len(OPTIONS)]}
        if prompts_alone:
            options = {"max_tokens": 1}
        params = SamplingParams(temperature=i % 2, ignore_eos=True, **options)
        request = AddRequest(str(i), reference.prompt_ids, params)
        scheduler.add(Sequence(request, seed=i, eos_token_ids=(), max_total_tokens=1024))
    tokens: dict[str, list[int]] = {}
    marks = StepMarks(tp.device)
    while (plan := scheduler.schedule()) is not None:
        output = runner.run(plan, marks)
        sampled_ids = output.tokens.cpu().numpy()
        records = [each.to_records(each.words.cpu().numpy()) for each in output.logprobs]
        logprobs = np.concatenate([sampled_ids[:0], *chain(*records)])
        for update in scheduler.finish(StepResult(plan.step, plan.samples, sampled_ids, logprobs)):
            tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
    return tokens, torch.stack([torch.stack(layer) for layer in caches])[:, :, 1:]


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_threshold": 24, **MICRO_BATCHED}],
    ids=["padded", "micro_batches"],
)
def test_the_split_schedule_matches_the_context_lengths(monkeypatch, settings) -> None:
    """Plain torch reads no schedule, so the test checks it on the way to the model."""
    forward = Decoder.forward
    num_rows = []

    def checked(model: Decoder, batches: list[MicroBatch], caches: list[KVCache]) -> Tensor:
        for batch in (each.attention for each in batches):
            plan = batch.split_schedule.numpy()
            used = plan[plan[:, END] > plan[:, BEGIN]]
            assert_every_token_is_in_one_split(used, batch.context_lens.tolist())
            num_splits = ContextSplit(model.local_num_kv_heads).num_splits(batch.num_decode)
            assert len(plan) == num_splits
            num_rows.append(batch.num_decode)
        return forward(model, batches, caches)

    monkeypatch.setattr(Decoder, "forward", checked)
    run_all("cpu", torch.float32, **settings)
    assert max(num_rows) > 1


@pytest.mark.parametrize("max_step_tokens", [64, 512])  # at 512, 20 prompts at once fit no size
def test_padded_steps_change_nothing(monkeypatch, max_step_tokens: int) -> None:
    """Run on the CPU, with an interpreted kernel, what a GPU runs without graphs."""
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernel is compiled for it")
    with monkeypatch.context() as patched:
        gather = batch_state.gather_decode_inputs_triton
        patched.setattr(step_inputs, "gather_decode_inputs", gather)
        padded_tokens, padded_cache = run_all("cpu", torch.float32, max_step_tokens=max_step_tokens)
    plain_tokens, plain_cache = run_all(
        "cpu", torch.float32, padded=False, max_step_tokens=max_step_tokens
    )
    assert padded_tokens == plain_tokens
    assert len(padded_tokens) == MAX_SEQS
    torch.testing.assert_close(padded_cache, plain_cache, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
@pytest.mark.parametrize(
    "padded, max_step_tokens, expected",
    [
        (True, 64, {("decode", True), ("mixed", True)}),
        (True, 512, {("decode", True), ("mixed", False)}),  # 20 prompts at once fit no size
        (False, 64, {("decode", False), ("mixed", False)}),
    ],
)
def test_every_step_is_made_of_step_inputs(
    monkeypatch, padded: bool, max_step_tokens: int, expected: set[tuple[str, bool]]
) -> None:
    """Decode and mixed steps, padded (True) and of true size."""
    sizes = [StepSize(size, size, 0) for size in decode_sizes(MAX_SEQS)] if padded else []
    sizes += mixed_sizes(max_step_tokens, MAX_SEQS) if padded else []
    found, made, forward = set(), [], Decoder.forward

    def make(inputs: StepInputs[Tensor], *args: Any) -> MicroBatch:
        made.append(step_inputs.micro_batch(inputs, *args))
        N, chunks = len(inputs.token_rows), inputs.chunks
        size = (N, N, 0) if chunks is None else (N, len(chunks.context_lens), len(chunks.rows))
        found.add(("decode" if chunks is None else "mixed", size in sizes))
        return made[-1]

    def checked(model: Decoder, batches: list[MicroBatch], caches: list[KVCache]) -> Tensor:
        assert batches == [made.pop()] and not made
        return forward(model, batches, caches)

    monkeypatch.setattr(model_runner, "micro_batch", make)
    monkeypatch.setattr(Decoder, "forward", checked)
    run_all("cpu", torch.float32, padded=padded, max_step_tokens=max_step_tokens)
    assert found == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
def test_micro_batches_change_nothing() -> None:
    whole_tokens, whole_cache = run_all("cpu", torch.float32, **MICRO_BATCHED)
    with count_splits() as count:
        tokens, cache = run_all("cpu", torch.float32, micro_batch_threshold=24, **MICRO_BATCHED)
    assert count.call_count > 2
    assert tokens == whole_tokens
    torch.testing.assert_close(cache, whole_cache, rtol=1e-4, atol=1e-4)


def count_splits() -> Any:
    return patch.object(model_runner, "split_plan", side_effect=micro_batches.split_plan)


def micro_batches_change_nothing(tp: TPGroup, dtype: torch.dtype) -> None:
    """Use copy streams. bfloat16 runs prompts only: matmuls of other sizes round differently."""
    hidden_size = ModelConfig.from_folder(resolve_model(None)).hidden_size
    tp = with_peer_memory(tp, hidden_size, dtype)
    tp = with_copy_streams(tp, MICRO_BATCHED["max_step_tokens"] // 2)
    assert tp.copy_streams
    device, exact = str(tp.device), dtype == torch.float32
    settings = {**MICRO_BATCHED, "prompts_alone": not exact}
    whole_tokens, whole_cache = run_all(device, dtype, replace(tp, copy_streams=()), **settings)
    with count_splits() as count:
        tokens, cache = run_all(device, dtype, tp, micro_batch_threshold=24, **settings)
    assert count.call_count > 2
    if exact:
        assert tokens == whole_tokens
        torch.testing.assert_close(cache, whole_cache, rtol=1e-3, atol=1e-3)
    else:
        error = (cache.float() - whole_cache.float()).norm() / whole_cache.float().norm()
        print(f"keys and values in bfloat16 differ by {error:.4f} of their norm")
        assert error < 0.02


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=FOUR_GPUS)])
def test_micro_batches_change_nothing_in_copy_streams(world_size: int, dtype: torch.dtype) -> None:
    run_ranks(micro_batches_change_nothing, world_size, dtype, device="cuda")


def test_decode_steps_of_all_sizes_share_their_inputs() -> None:
    """Separate block tables for each size would take gigabytes at 4,096 rows of 8,192 blocks."""
    model, tp, config = shipped_model("cpu", torch.float32)
    limits = PlanLimits(40, 512, 4, BLOCK_SIZE, config.vocab_size, max_logprobs=20)
    runner = make_runner(model, tp, limits, padded=True)
    inputs = [runner.state.decode_inputs(size) for size in decode_sizes(limits.max_num_seqs)]
    assert [len(each.block_tables) for each in inputs] == [1, 2, 4, 8, 16, 24, 32, 40]
    assert len({each.block_tables.data_ptr() for each in inputs}) == 1


def test_the_rotary_table_covers_the_largest_step() -> None:
    """max_model_len may end inside a block; the trial step reaches the block's end."""
    config = EngineConfig.resolve(device="cpu", max_model_len=300, max_num_seqs=1)
    limits = config.plan_limits
    worker = object.__new__(Worker)
    worker._config, worker._device, worker._dtype = config, torch.device("cpu"), torch.float32
    worker._tp, worker._progress = TPGroup.single(worker._device), Mock()
    model = worker._load_model(LayerContext(worker._tp, worker._dtype))
    longest = int(largest_step(limits, 0).num_tokens.max())
    assert longest == limits.max_tokens_per_seq > 300
    attention = model.blocks[0]
    assert isinstance(attention, SelfAttention)
    assert len(attention.cos_sin) >= longest


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_the_largest_step_leaves_no_options_in_the_table(device: str) -> None:
    """It measures memory, so all rows have every option."""
    model, tp, config = shipped_model(device, torch.float32)
    limits = PlanLimits(3, 40, 4, BLOCK_SIZE, config.vocab_size, max_logprobs=20)
    runner = make_runner(model, tp, limits, padded=False)
    runner.use_cache(allocate_cache(model, 1, tp))
    plan = largest_step(limits, runner.state.padding_row)
    assert (plan.rows.size, plan.token_ids.size) == (3, 40)
    output = runner.run(plan, StepMarks(tp.device))
    assert output.tokens.tolist() == [0] * 3  # the only id that it allows
    assert sorted(each.words.shape for each in output.logprobs) == [(3, 43), (40, 43)]
    run_largest_steps(runner, StepMarks(tp.device))
    assert not runner.row_table.has_options
    words = runner.row_table.words[runner.state.padding_row].cpu().numpy()
    assert words.view(ROW)["top_k"] == 0 and not words.view(ROW)["list_sizes"].any()


def test_graphs_are_captured_on_padding_after_any_earlier_upload() -> None:
    model, tp, config = shipped_model("cpu", torch.float32)
    limits = PlanLimits(20, 64, 4, BLOCK_SIZE, config.vocab_size, max_logprobs=20)
    runner = make_runner(model, tp, limits, padded=True)
    split = ContextSplit(model.local_num_kv_heads)
    for size in runner.graph_sizes:
        runner._staging.send([np.full(512, 99_999, dtype=np.int32)])
        runner._upload_padding(size)
        rows, *rest = runner._staging.views(upload_sizes(size, split))
        assert set(rows.tolist()) == {20}
        if size.num_chunks:
            assert set(rest.pop(4).tolist()) == {20}
        else:
            of_one_token = split.schedule(np.ones(size.num_decode, dtype=np.int32))
            assert rest.pop().tolist() == of_one_token.reshape(-1).tolist()
        assert not any(array.any() for array in rest)


@pytest.mark.gpu
def test_graphs_and_eager_steps_agree_bit_by_bit() -> None:
    eager_tokens, eager_cache = run_all("cuda:0", torch.bfloat16)
    graph_tokens, graph_cache = run_all("cuda:0", torch.bfloat16, capture=True)
    assert graph_tokens == eager_tokens
    assert torch.equal(graph_cache, eager_cache)


@pytest.mark.gpu
def test_half_precision_is_as_exact_as_transformers() -> None:
    """Compare errors of bfloat16 logits against float32, over a prompt of 400 tokens."""
    from transformers import Qwen3ForCausalLM as Theirs

    def logits_of_transformers(dtype: torch.dtype) -> Tensor:
        theirs: Any = Theirs.from_pretrained(folder, dtype=dtype)
        logits: Tensor = theirs.to(tp.device)(batch).logits[0]
        return logits

    folder = resolve_model(None)
    ids = [token for reference in shipped_greedy() for token in reference.prompt_ids][:400]
    batch = torch.tensor([ids], device="cuda")
    model, tp, _ = shipped_model("cuda:0", torch.bfloat16)
    with torch.inference_mode():
        exact = logits_of_transformers(torch.float32)
        theirs = logits_of_transformers(torch.bfloat16)
        N = len(ids)
        positions = torch.arange(N, dtype=torch.int32, device=tp.device)
        bounds = torch.tensor([0, N], dtype=torch.int32, device=tp.device)
        table = torch.tensor([[1, 2]], dtype=torch.int32, device=tp.device)
        prefill = PrefillBatch(bounds, bounds, N, N, table, has_context=False)
        nothing = positions[:0]
        attention = AttentionBatch(
            BLOCK_SIZE + positions, 0, nothing, table[:0], nothing.view(0, SPLIT_WORDS), prefill
        )
        caches = allocate_cache(model, 3, tp)
        hidden = model([MicroBatch(batch[0].int(), positions, attention)], caches)
        ours = model.compute_logits(hidden)
    our_error = (ours.float() - exact).pow(2).mean().sqrt().item()
    their_error = (theirs.float() - exact).pow(2).mean().sqrt().item()
    print(f"rms error of bfloat16 logits: ours {our_error:.4f}, transformers {their_error:.4f}")
    assert our_error <= 2 * their_error
