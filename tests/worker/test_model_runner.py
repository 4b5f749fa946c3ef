"""The runner on a GPU: graphs against eager steps bit by bit, half precision against float32."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import shipped_greedy
from tpllm.channel.step_plan import PlanLimits, StepResult
from tpllm.checkpoint import resolve_model
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.request import AddRequest, Sequence
from tpllm.engine.scheduler import Scheduler
from tpllm.layers.attention import AttentionBatch, KVCache, PrefillBatch, choose_backend
from tpllm.model_config import ModelConfig
from tpllm.models.checkpoint_weights import SafetensorsWeights
from tpllm.models.qwen3 import Qwen3ForCausalLM
from tpllm.parallel.group import TPGroup
from tpllm.sampling_params import SamplingParams
from tpllm.worker.kv_cache import CacheShape
from tpllm.worker.model_runner import ModelRunner
from tpllm.worker.step_times import StepMarks

pytestmark = pytest.mark.gpu

BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS = 256, 40, 20


def shipped_model(dtype: torch.dtype) -> tuple[Qwen3ForCausalLM, TPGroup, ModelConfig]:
    folder = resolve_model(None)
    config = ModelConfig.from_folder(folder)
    tp = TPGroup.single(torch.device("cuda", 0))
    backend = choose_backend(tp.device, use_flash_attn=True)
    model = Qwen3ForCausalLM(config, tp, dtype, 1024, backend)
    model.load(SafetensorsWeights(folder))
    return model, tp, config


def allocate_cache(model: Qwen3ForCausalLM, num_blocks: int, tp: TPGroup) -> list[KVCache]:
    shape = CacheShape(
        model.num_layers,
        BLOCK_SIZE,
        model.local_num_kv_heads,
        model.head_dim,
        torch.bfloat16,
    )
    return shape.allocate(num_blocks, tp.device)


def run_all(capture: bool) -> tuple[dict[str, list[int]], Tensor]:
    """Tokens of every request, and the cache as they left it."""
    model, tp, config = shipped_model(torch.bfloat16)
    limits = PlanLimits(MAX_SEQS, 512, 4, BLOCK_SIZE)
    runner = ModelRunner(model, tp, limits, config.vocab_size, static_decode=True)
    caches = allocate_cache(model, NUM_BLOCKS, tp)
    runner.use_cache(caches)
    if capture:
        runner.capture_graphs(runner.decode_sizes)
    scheduler = Scheduler(BlockManager(NUM_BLOCKS, BLOCK_SIZE), limits)
    for i, reference in enumerate(shipped_greedy()[:MAX_SEQS]):
        params = SamplingParams(temperature=i % 2, max_tokens=5 + i, ignore_eos=True)
        request = AddRequest(str(i), reference.prompt_ids, params)
        scheduler.add(Sequence(request, seed=i, eos_token_ids=(), max_total_tokens=1024))
    tokens: dict[str, list[int]] = {}
    marks = StepMarks(tp.device)
    while (plan := scheduler.schedule()) is not None:
        drawn = runner.run(plan, marks).cpu().numpy()
        for update in scheduler.finish(StepResult(plan.step, plan.samples, drawn)):
            tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
    return tokens, torch.stack([torch.stack(layer) for layer in caches])[:, :, 1:]


def test_graphs_and_eager_steps_agree_bit_by_bit() -> None:
    (eager_tokens, eager_cache), (graph_tokens, graph_cache) = run_all(False), run_all(True)
    assert graph_tokens == eager_tokens
    assert torch.equal(graph_cache, eager_cache)


def test_half_precision_is_as_exact_as_transformers() -> None:
    """Error of bfloat16 logits against float32, over a prompt of 400 tokens."""
    from transformers import Qwen3ForCausalLM as Theirs

    def logits_of_transformers(dtype: torch.dtype) -> Tensor:
        theirs: Any = Theirs.from_pretrained(folder, dtype=dtype)
        logits: Tensor = theirs.to(tp.device)(batch).logits[0]
        return logits

    folder = resolve_model(None)
    ids = [token for reference in shipped_greedy() for token in reference.prompt_ids][:400]
    batch = torch.tensor([ids], device="cuda")
    model, tp, _ = shipped_model(torch.bfloat16)
    with torch.inference_mode():
        exact = logits_of_transformers(torch.float32)
        theirs = logits_of_transformers(torch.bfloat16)
        N = len(ids)
        positions = torch.arange(N, dtype=torch.int32, device=tp.device)
        bounds = torch.tensor([0, N], dtype=torch.int32, device=tp.device)
        table = torch.tensor([[1, 2]], dtype=torch.int32, device=tp.device)
        prefill = PrefillBatch(bounds, bounds, N, N, table, has_context=False)
        attention = AttentionBatch(BLOCK_SIZE + positions, 0, positions[:0], table[:0], prefill)
        caches = allocate_cache(model, 3, tp)
        hidden = model(batch[0].int(), positions, attention, caches)
        ours = model.compute_logits(hidden)
    our_error = (ours.float() - exact).pow(2).mean().sqrt().item()
    their_error = (theirs.float() - exact).pow(2).mean().sqrt().item()
    print(f"rms error of bfloat16 logits: ours {our_error:.4f}, transformers {their_error:.4f}")
    assert our_error <= 2 * their_error
