"""Weight sources: safetensors in one file or many, and random weights of any TP size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpllm.config.checkpoint_files import INDEX_NAME
from tpllm.config.model_config import ModelConfig
from tpllm.models.checkpoint_weights import DummyWeights, SafetensorsWeights

TENSORS = {
    "a.weight": torch.arange(35.0).view(7, 5),
    "b.weight": torch.arange(12.0, dtype=torch.bfloat16).view(3, 4),
    "norm.weight": torch.arange(6.0),
}


def save_one_file(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")


def save_with_index(folder: Path) -> None:
    files = {"1.safetensors": ["a.weight", "norm.weight"], "2.safetensors": ["b.weight"]}
    save_file({name: -1 - tensor for name, tensor in TENSORS.items()}, folder / "1.safetensors")
    # The last file's values count, not the file that the index names: as in transformers.
    save_file(TENSORS, folder / "2.safetensors")
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("save", [save_one_file, save_with_index])
def test_slices_equal_those_of_the_saved_tensor(
    save: Callable[[Path], None], tmp_path: Path
) -> None:
    save(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor)
        assert weights.read(name).dtype == tensor.dtype
        assert torch.equal(weights.read(name, rows=slice(1, 3)), tensor[1:3])
    for name in ["a.weight", "b.weight"]:
        tensor = TENSORS[name]
        assert torch.equal(weights.read(name, cols=slice(1, 3)), tensor[:, 1:3])
        assert torch.equal(weights.read(name, slice(2, 3), slice(0, 4)), tensor[2:3, 0:4])


def test_a_tied_embedding_may_be_saved_as_the_head_alone(tmp_path: Path) -> None:
    save_file({"lm_head.weight": TENSORS["a.weight"]}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(weights.read(name), TENSORS["a.weight"])


def test_an_unknown_tensor_is_an_error_that_names_it(tmp_path: Path) -> None:
    save_one_file(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} has no tensor lm_head.weight"):
        SafetensorsWeights(tmp_path).read("lm_head.weight")


def test_a_folder_without_safetensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        SafetensorsWeights(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 37,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "initializer_range": 0.02,
        "model_type": "qwen3",
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return ModelConfig.from_folder(tmp_path)


def test_dummy_weights_are_slices_of_the_same_tensor(config: ModelConfig) -> None:
    def read(name: str, *slices: slice) -> Tensor:
        return DummyWeights(config.spec, torch.device("cpu"), torch.float32).read(name, *slices)

    for name, shape in config.spec.shapes().items():
        full = read(name)
        assert full.shape == shape
        assert torch.equal(read(name, slice(3, 7)), full[3:7])
        if len(shape) == 2:
            assert torch.equal(read(name, slice(None), slice(3, 7)), full[:, 3:7])


def test_dummy_weights_are_normal_and_norms_are_one(config: ModelConfig) -> None:
    weights = DummyWeights(config.spec, torch.device("cpu"), torch.bfloat16)
    up, down = (weights.read(f"model.layers.0.mlp.{part}_proj.weight") for part in ["up", "down"])
    assert up.dtype == torch.bfloat16
    assert up.float().std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert abs(up.float().mean().item()) < 0.1 * config.initializer_range
    assert not torch.equal(up.flatten(), down.flatten())  # every name has different numbers
    for name in ["model.norm.weight", "model.layers.1.self_attn.k_norm.weight"]:
        assert torch.equal(weights.read(name), torch.ones_like(weights.read(name)))
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.2\.mlp"):
        weights.read("model.layers.2.mlp.up_proj.weight")
