"""The equality tests on GPUs: float32 against transformers, half precision through CUDA graphs."""

from pathlib import Path
from typing import Any

import pytest

from tests.marks import FOUR_GPUS
from tests.reference import assert_equal, make_random_model, shipped_greedy, transformers_greedy
from tests.test_equality import prompts_with_shared_prefixes
from tpllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=64)
TP_SIZES = [
    pytest.param(1, marks=pytest.mark.gpu),
    pytest.param(2, marks=pytest.mark.multi_gpu),
    pytest.param(4, marks=FOUR_GPUS),
]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("tp", TP_SIZES)
def test_float32_equals_transformers(tp: int, plain: bool) -> None:
    """With every fast path, and `plain` without those that have a switch."""
    switches: dict[str, Any] = {"disable_custom_all_reduce": plain, "disable_custom_matmul": plain}
    switches["attention_backend"] = "torch" if plain else "auto"
    references = shipped_greedy()
    prompts = [reference.prompt_ids for reference in references]
    with LLM(dtype="float32", tensor_parallel_size=tp, num_kv_blocks=60, **switches) as llm:
        for _ in range(2):
            assert_equal(references, llm.generate(prompts, GREEDY, use_tqdm=False))
        stats = llm._coordinator.stats
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("tp", TP_SIZES)
def test_random_float32_models_continue_as_in_transformers(tp: int, tmp_path: Path) -> None:
    folder = make_random_model(tmp_path, num_key_value_heads=1, max_shard_size="500KB")
    references = transformers_greedy(folder, prompts_with_shared_prefixes(4099), 12)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(
        folder,
        dtype="float32",
        tensor_parallel_size=tp,
        max_num_batched_tokens=700,
        skip_tokenizer_init=True,
    ) as llm:
        prompts = [reference.prompt_ids for reference in references]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_equal(references, outputs)
    assert outputs[-1].num_cached_tokens == 512


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {"num_attention_heads": 14, "hidden_size": 56},  # groups of seven
}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_query_norms_continue_as_in_transformers(
    family: str, tmp_path: Path
) -> None:
    folder = make_random_model(tmp_path, family, **FAMILIES[family])
    references = transformers_greedy(folder, prompts_with_shared_prefixes(4099)[1:], 12)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(folder, dtype="float32", skip_tokenizer_init=True) as llm:
        for some in (references, references[:1]):  # several rows, and one
            prompts = [reference.prompt_ids for reference in some]
            assert_equal(some, llm.generate(prompts, params, use_tqdm=False))


@pytest.mark.parametrize("tp", TP_SIZES)
def test_graphs_draw_what_eager_steps_draw(tp: int) -> None:
    """Half precision on flash-attn; every batch size from 32 down to 1 occurs as rows end."""
    prompts = [reference.prompt_ids for reference in shipped_greedy()]
    params = [
        SamplingParams(temperature=0.7 * (i % 2), max_tokens=10 + i, ignore_eos=True, seed=i)
        for i in range(len(prompts))
    ]

    def tokens(**settings: Any) -> list[list[int]]:
        with LLM(dtype="bfloat16", tensor_parallel_size=tp, max_num_seqs=32, **settings) as llm:
            assert "flash-attn 2" in llm.profiler().engine_info["attention"]
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert tokens() == tokens(enforce_eager=True)


@pytest.mark.parametrize("tp", TP_SIZES)
def test_held_out_sums_are_right_in_bfloat16(tp: int) -> None:
    sums = [(i, 7 * i % 500) for i in range(1, 200, 2)]
    with LLM(dtype="bfloat16", tensor_parallel_size=tp) as llm:
        conversations = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]
        outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    right = [
        int(out.outputs[0].text == str(a + b)) for out, (a, b) in zip(outputs, sums, strict=True)
    ]
    assert sum(right) >= 98


@pytest.mark.gpu
def test_a_cache_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.00.*leaves 0 KV blocks"):
        LLM(gpu_memory_utilization=0.001)
