"""All that follows from a family's spec alone."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.limit import Limit
from tpllm.architectures import registry
from tpllm.config.checkpoint import check_checkpoint
from tpllm.config.devices import Gpu
from tpllm.config.engine_config import EngineConfig
from tpllm.config.model_config import ModelConfig
from tpllm.layers.context import LayerContext
from tpllm.models.checkpoint_weights import SafetensorsWeights
from tpllm.models.decoder import make_model
from tpllm.parallel.group import TPGroup
from tpllm.worker.warm_up import Kernels

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that transformers has written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def test_without_its_line_in_the_registry_it_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [each for each in registry.FAMILIES if each.model_type != "llama"]
    monkeypatch.setattr(registry, "FAMILIES", others)
    with pytest.raises(ValueError, match="model_type='llama' is not implemented"):
        ModelConfig.from_folder(folder)


def test_absent_fields_have_the_values_of_the_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "head_dim": None}))
    config = ModelConfig.from_folder(tmp_path)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (128, 32, 32000)
    assert (config.attention_bias, config.mlp_bias, config.eos_token_ids) == (False, False, (2,))


def test_its_checkpoint_is_checked(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    assert check_checkpoint(folder, config).spec == config.spec
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert {name: tuple(each.shape) for name, each in tensors.items()} == config.spec.shapes()
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)  # as Qwen3 has
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lacks tensors for the LlamaForCausalLM .*0\.mlp\.up_pr"):
        check_checkpoint(folder, config)


def test_a_group_that_cannot_divide_it_is_refused(folder: Path) -> None:
    config = ModelConfig.from_folder(folder, name="Llama")
    config.check_parallel(4)
    with pytest.raises(ValueError, match=r"num_attention_heads=4 of Llama; use one of \[1, 2, 4\]"):
        config.check_parallel(3)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_memory_of_a_rank_is_estimated(folder: Path, tp: int) -> None:
    kv_heads = max(1, 2 // tp)
    block = 64 * 16 * (2 * 4 // tp + 2 * kv_heads) + 3 * 64 * 96 // tp + 2 * 64
    expected = 2 * (100 // tp * 64 + block) + 64
    assert ModelConfig.from_folder(folder).spec.local_size(tp) == expected


@pytest.mark.parametrize("rank, tp", [(0, 1), (1, 2), (3, 4)])
def test_its_weights_are_loaded_by_the_spec_and_take_the_memory(
    folder: Path, rank: int, tp: int
) -> None:
    config = ModelConfig.from_folder(folder)
    spec = config.spec
    context = LayerContext(TPGroup(rank, tp, torch.device("cpu"), None), torch.float32)
    model = make_model(config.architecture, spec, context, max_positions=16)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    model.load(SafetensorsWeights(folder))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.local_size(tp)


def test_a_gpu_that_is_too_small_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("toy", "GPU-0", (9, 0), free_bytes=2**10, total_bytes=2**10)
    monkeypatch.setattr("tpllm.config.engine_config.visible_gpus", lambda: [gpu])
    with pytest.raises(ValueError, match="GiB of weights on GPU 0"):
        EngineConfig.resolve(folder, skip_tokenizer_init=True)


def test_the_hardware_limit_follows(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    limit = Limit(config, 1, copy_TB_per_s=1, matmul_TFLOP_per_s=1e6)
    matmuls = [math.prod(shape) for shape in config.spec.shapes().values() if len(shape) == 2]
    num_bytes = 2 * (sum(matmuls) - 100 * 64)  # the embedding is looked up
    assert limit.decode_step_s(1, 0) == pytest.approx(num_bytes / 1e12)


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_its_kernels_are_launched_while_weights_are_read(
    folder: Path, rank: int, world_size: int
) -> None:
    config = EngineConfig.resolve(folder, device="cpu", skip_tokenizer_init=True, max_model_len=64)
    config = replace(config, attention_backend="triton")
    kernels = Kernels(config, rank, world_size, torch.device("cpu"))
    for launch in kernels.of_this_rank() + kernels.of_block():
        launch()
