"""The engine against transformers: the same tokens, however the work is split and scheduled."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.reference import (
    DATA,
    Greedy,
    assert_equal,
    make_random_model,
    shipped_greedy,
    transformers_greedy,
)
from tpllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("forked_engines")

GREEDY = SamplingParams(temperature=0, max_tokens=64)
FEW = SamplingParams(temperature=0, max_tokens=16)
# What the scheduler must do with the 32 shipped prompts under these settings, besides being right.
# Preemptions on two ranks are in test_llm.py and test_structured_llm.py.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny cache": {"num_kv_blocks": 40},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_caching": False},
    "blocks of 256": {"kv_block_size": 256},
}


def run(llm: LLM, references: list[Greedy], params: SamplingParams = GREEDY) -> list[Any]:
    """Continue the references' prompts, all in one call, and check them."""
    outputs = llm.generate([r.prompt_ids for r in references], params, use_tqdm=False)
    expected = [replace(r, output_ids=r.output_ids[: params.max_tokens]) for r in references]
    assert_equal(expected, outputs)
    return outputs


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp={}".format)
def shipped(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(device="cpu", tensor_parallel_size=request.param) as llm:
        yield llm


def test_shipped_prompts_all_together(shipped: LLM) -> None:
    run(shipped, shipped_greedy())


def test_shipped_prompts_alone(shipped: LLM) -> None:
    # what other ranks could do wrong with one row shows at once, and their steps take long
    every, params = (6, GREEDY) if shipped.config.tensor_parallel_size == 1 else (12, FEW)
    for reference in shipped_greedy()[::every]:
        run(shipped, [reference], params)


def test_a_second_run_finds_its_prompts_in_the_cache(shipped: LLM) -> None:
    references = [r for r in shipped_greedy() if len(r.prompt_ids) > 16]
    shipped.reset_prefix_cache()
    first = run(shipped, references, FEW)
    second = run(shipped, references, FEW)
    assert sum(output.num_cached_tokens for output in first) == 0
    for output in second:
        cached = output.num_cached_tokens
        assert cached % 16 == 0
        assert len(output.prompt_token_ids) - 16 <= cached < len(output.prompt_token_ids)


def test_held_out_exercises_score_what_transformers_scores(shipped: LLM) -> None:
    if shipped.config.tensor_parallel_size != 1:
        pytest.skip("once is enough: other sizes agree by the tests above")
    exercises = {
        kind: items[::4] for kind, items in json.loads((DATA / "heldout.json").read_text()).items()
    }
    conversations = [
        [{"role": "user", "content": item["prompt"]}]
        for kind in exercises.values()
        for item in kind
    ]
    params = SamplingParams(temperature=0, max_tokens=128)
    outputs = iter(shipped.chat(conversations, params, use_tqdm=False))
    num_right = {
        kind: sum(next(outputs).outputs[0].text.strip() == item["answer"] for item in items)
        for kind, items in exercises.items()
    }
    assert num_right == {  # of 50 each
        "add": 50,
        "sub": 50,
        "count": 50,
        "sort": 50,
        "repeat": 50,
        "spell": 48,
        "upper": 45,
        "reverse": 44,
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_change_nothing(variant: str) -> None:
    references = shipped_greedy()
    with LLM(device="cpu", **VARIANTS[variant]) as llm:
        run(llm, references)
        if variant != "blocks of 256":  # no prompt is that long
            run(llm, references)  # with whatever the first run left in the cache
        stats = llm._coordinator.stats
    assert (stats.num_preemptions > 0) == (variant == "tiny cache")
    assert (stats.num_prefill_chunks > 0) == (variant == "chunks of 16")
    if variant == "chunks of 16":
        assert stats.num_mixed_steps > 0
        assert stats.num_cached_tokens > 0
    if variant == "no prefix cache":
        assert stats.num_cached_tokens == 0


# ---- random models -------------------------------------------------------------------------------


def prompts_with_shared_prefixes(vocab_size: int) -> list[list[int]]:
    """255 to 2,000 tokens; the later ones begin like earlier ones, within a block and beyond."""
    numbers = random.Random(0)
    base = [numbers.randrange(vocab_size) for _ in range(2000)]

    def branch(shared: int, length: int) -> list[int]:
        return base[:shared] + [numbers.randrange(vocab_size) for _ in range(length - shared)]

    return [base, branch(0, 255), branch(0, 256), branch(250, 257), branch(512, 900), base[:513]]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 512,  # the longest prompt has 2,000 tokens
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
# family, ranks, changes; with "few blocks", preemptions
RANDOM_MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one KV head, tp=4": ("Qwen3", 4, {"num_key_value_heads": 1}),
    "two KV heads, tp=4, sharded files": ("Qwen3", 4, {"max_shard_size": "500KB"}),
    "three KV heads, tp=3": ("Qwen3", 3, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "tied, tp=1": ("Qwen3", 1, {"tie_word_embeddings": True}),
    "Llama, three KV heads, groups of three, llama3, tp=3": (
        "Llama",
        3,
        {"num_attention_heads": 9, "num_key_value_heads": 3, "rope_parameters": LLAMA3}
        | {"hidden_size": 72, "tie_word_embeddings": True},
    ),
    "Llama with biases, tp=2, few blocks": ("Llama", 2, {"attention_bias": True, "mlp_bias": True}),
    "Qwen2, groups of seven, yarn, tp=2": (
        "Qwen2",
        2,
        {"num_attention_heads": 14, "hidden_size": 56, "rope_parameters": YARN},
    ),
    "Qwen2, tied, tp=1, few blocks": ("Qwen2", 1, {"tie_word_embeddings": True}),
    "Mistral, one KV head, tp=2": (
        "Mistral",
        2,
        {"num_key_value_heads": 1, "sliding_window": 4096},
    ),
}


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_models_continue_as_in_transformers(name: str, tmp_path: Path) -> None:
    family, tp, changes = RANDOM_MODELS[name]
    folder = make_random_model(tmp_path, family, **changes)
    if "sharded" in name:
        assert len(list(folder.glob("*.safetensors"))) > 1
    num_tokens = 12
    references = transformers_greedy(folder, prompts_with_shared_prefixes(4099), num_tokens)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    with LLM(
        folder,
        device="cpu",
        tensor_parallel_size=tp,
        max_num_batched_tokens=700,
        num_kv_blocks=187 if "few blocks" in name else None,
        skip_tokenizer_init=True,
    ) as llm:
        outputs = run(llm, references, params)
        stats = llm._coordinator.stats
    assert stats.num_prefill_chunks > 0
    if "few blocks" in name:
        assert stats.num_preemptions > 0
        return
    # the last prompt begins like the first, which runs beside it: found within the same run
    assert outputs[-1].num_cached_tokens == 512
