"""Checkpoints as other programs write them: our logits are those of transformers.

transformers saves a model, each test rearranges the files, and both engines load the result.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models.test_qwen3 import LENGTHS, TOLERANCE, make_model, run_steps, save_checkpoint
from tpllm.architectures.decoder import EMBEDDING, HEAD
from tpllm.config.checkpoint import check_checkpoint
from tpllm.config.checkpoint_files import INDEX_NAME, WEIGHTS_NAME
from tpllm.config.model_config import ModelConfig
from tpllm.layers.context import LayerContext
from tpllm.models.checkpoint_weights import SafetensorsWeights
from tpllm.parallel.group import TPGroup

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    """Return config and tensors of an untied model."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder, {"vocab_size": 131, "num_hidden_layers": 2}, sharded=False)
    return json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS_NAME)


def write(folder: Path, tensors: Tensors, file: str = WEIGHTS_NAME) -> None:
    save_file(
        {name: each.clone() for name, each in tensors.items()}, folder / file, {"format": "pt"}
    )


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(content))


def negated(tensors: Tensors) -> Tensors:
    return {name: -tensor for name, tensor in tensors.items()}


def tied_with_a_head_of_its_own(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config["tie_word_embeddings"] = True
    write(folder, tensors)


def tied_with_a_copy_as_head(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config["tie_word_embeddings"] = True
    write(folder, tensors | {HEAD: tensors[EMBEDDING]})


def tied_with_the_head_alone(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config["tie_word_embeddings"] = True
    write(folder, {name: each for name, each in tensors.items() if name != EMBEDDING})


def tied_with_the_embedding_alone(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config["tie_word_embeddings"] = True
    write(folder, {name: each for name, each in tensors.items() if name != HEAD})


def heads_in_two_files(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config["tie_word_embeddings"] = True
    write(folder, {HEAD: tensors.pop(HEAD)}, "b.safetensors")
    write(folder, tensors, "a.safetensors")
    write_index(folder, {HEAD: "b.safetensors", EMBEDDING: "a.safetensors"})


def without_prefix(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config["architectures"] = ["Qwen3Model"]
    write(folder, {name.removeprefix("model."): each for name, each in tensors.items()})


def without_prefix_and_head(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config |= {"architectures": ["Qwen3Model"], "tie_word_embeddings": True}
    del tensors[HEAD]
    write(folder, {name.removeprefix("model."): each for name, each in tensors.items()})


def with_the_prefix_twice(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    write(folder, {f"model.{name}": each for name, each in tensors.items()})


def with_rotary_buffers(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    names = ["model", *(f"model.layers.{i}.self_attn" for i in range(2))]
    write(folder, tensors | {f"{name}.rotary_emb.inv_freq": torch.ones(8) for name in names})


def index_beside_a_single_file(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    write(folder, tensors)
    write(folder, negated(tensors), "a.safetensors")
    write_index(folder, dict.fromkeys(tensors, "a.safetensors"))


def index_to_nowhere_beside_a_single_file(
    folder: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    write(folder, tensors)
    write_index(folder, dict.fromkeys(tensors, "gone.safetensors"))


def index_that_names_few_tensors(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    write(folder, tensors, "a.safetensors")
    write_index(folder, {EMBEDDING: "a.safetensors"})


def tensors_in_two_files(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    write(folder, tensors, "a.safetensors")
    write(folder, negated({"model.norm.weight": tensors["model.norm.weight"]}), "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}
    write_index(folder, weight_map)


def config_of_an_older_program(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    config |= {"rope_theta": 5e3, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    del config["rope_parameters"], config["architectures"]
    write(folder, tensors)


REARRANGEMENTS: list[Callable[[Path, dict[str, Any], Tensors], None]] = [
    tied_with_a_head_of_its_own,
    tied_with_a_copy_as_head,
    tied_with_the_head_alone,
    tied_with_the_embedding_alone,
    heads_in_two_files,
    without_prefix,
    without_prefix_and_head,
    with_the_prefix_twice,
    with_rotary_buffers,
    index_beside_a_single_file,
    index_to_nowhere_beside_a_single_file,
    index_that_names_few_tensors,
    tensors_in_two_files,
    config_of_an_older_program,
]


@pytest.mark.parametrize("rearrange", REARRANGEMENTS)
def test_what_transformers_loads_we_load(rearrange, saved, tmp_path):
    config, tensors = saved[0].copy(), saved[1].copy()
    rearrange(tmp_path, config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(131, (n,), generator=generator) for n in LENGTHS]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [theirs(sequence[None]).logits[0] for sequence in sequences]

    tp = TPGroup.single(torch.device("cpu"))
    ours = check_checkpoint(tmp_path, ModelConfig.from_folder(tmp_path))
    model = make_model(ours, LayerContext(tp, torch.float32))
    model.load(SafetensorsWeights(tmp_path))
    found = run_steps(model, [sequence.int() for sequence in sequences], tp)
    for logits, right in zip(found, expected, strict=True):
        assert (logits - right).abs().max() < TOLERANCE
    is_tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert ours.tie_word_embeddings == is_tied
