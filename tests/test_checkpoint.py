import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoints import write_config, write_weights
from tpllm.checkpoint import INDEX_NAME, WEIGHTS_NAME, check_checkpoint, resolve_model
from tpllm.model_config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def config(tmp_path) -> ModelConfig:
    """A model of one narrow layer, whose folder has no weights yet."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 1}
    return ModelConfig.from_folder(write_config(tmp_path, **sizes, eos_token_id=None))


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_no_model_means_the_one_shipped_inside():
    folder = resolve_model(None)
    config = ModelConfig.from_folder(folder)
    files = check_checkpoint(folder, config)
    assert set(files) == set(config.tensor_shapes())
    assert set(files.values()) == {folder / WEIGHTS_NAME}


def test_a_local_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert resolve_model("model") == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize("model", ["/nowhere/model", "a/b/c", "no such id", "x" * 5000])
def test_what_can_be_no_hub_id_is_a_missing_folder(model):
    with pytest.raises(FileNotFoundError, match="^model=.*: there is no such folder"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path):
    write_config(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer='.*config\.json' is a file; give the folder"):
        resolve_model(str(tmp_path / "config.json"), setting="tokenizer")


def test_a_hub_id_that_cannot_be_had_is_refused_with_the_reason(monkeypatch):
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"model='Qwen/Qwen3-8B' is neither.*\(no network\)"
    ):
        resolve_model("Qwen/Qwen3-8B")


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_downloads_weights_only_where_they_are_wanted(monkeypatch, tmp_path, weights):
    asked: dict[str, list[str]] = {}

    def download(model: str, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-8B", weights=weights) == tmp_path
    assert ("*.safetensors" in asked["allow_patterns"]) is weights


def test_sharded_files_are_found_through_the_index(tmp_path, config):
    shapes = config.tensor_shapes()
    first = {EMBEDDING: shapes.pop(EMBEDDING), "unused": (3,)}  # the index leaves "unused" out
    write_weights(tmp_path / "a.safetensors", first)
    write_weights(tmp_path / "b.safetensors", shapes)
    write_index(tmp_path, {EMBEDDING: "a.safetensors"} | dict.fromkeys(shapes, "b.safetensors"))
    files = check_checkpoint(tmp_path, config)
    assert files.pop(EMBEDDING) == tmp_path / "a.safetensors"
    assert set(files.values()) == {tmp_path / "b.safetensors"}


def test_a_tied_checkpoint_may_carry_its_head_all_the_same(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.tensor_shapes() | {"lm_head.weight": (16, 8)})
    assert "lm_head.weight" not in check_checkpoint(tmp_path, config)


def test_missing_tensors_are_named(tmp_path, config):
    shapes = config.tensor_shapes()
    del shapes["model.norm.weight"], shapes[EMBEDDING]
    write_weights(tmp_path / WEIGHTS_NAME, shapes)
    message = r"lacks tensors .* \(2\): model.embed_tokens.weight; model.norm.weight"
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path, config)


def test_a_long_list_of_tensors_is_cut_short(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, {"model.norm.weight": (8,)})
    with pytest.raises(ValueError, match=r"\(12\): [^;]*; [^;]*; [^;]*; [^;]*; \.\.\.$"):
        check_checkpoint(tmp_path, config)


def test_unknown_tensors_are_named(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.tensor_shapes() | {"model.extra": (1,)})
    with pytest.raises(ValueError, match=r"has unknown tensors .* \(1\): model.extra"):
        check_checkpoint(tmp_path, config)


def test_misshapen_tensors_are_named_with_both_shapes(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.tensor_shapes() | {EMBEDDING: (15, 8)})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is \[15, 8\], not \[16, 8\]"):
        check_checkpoint(tmp_path, config)


def test_weights_that_are_no_floats_are_refused(tmp_path, config):
    shapes = config.tensor_shapes()
    save_file({name: np.zeros(s, np.int8) for name, s in shapes.items()}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="is I8, not one of F16, BF16, F32"):
        check_checkpoint(tmp_path, config)


def test_a_folder_without_weights_is_refused(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor model.safe"):
        check_checkpoint(tmp_path, config)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, length):
    folder = resolve_model(None)
    copy = tmp_path / WEIGHTS_NAME
    shutil.copyfile(folder / WEIGHTS_NAME, copy)
    os.truncate(copy, length % (copy.stat().st_size))
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        check_checkpoint(tmp_path, ModelConfig.from_folder(folder))


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a", "x/a", "..", ".", "", 5, "x\\a.safetensors"]
)
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path, config, file):
    write_index(tmp_path, {EMBEDDING: file})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is in .* no plain name"):
        check_checkpoint(tmp_path, config)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_an_index_without_a_map_is_refused(tmp_path, config, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match="weight_map must name the file of each tensor"):
        check_checkpoint(tmp_path, config)


def test_a_file_the_index_names_must_be_there(tmp_path, config):
    write_index(tmp_path, {EMBEDDING: "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing, and .* puts"):
        check_checkpoint(tmp_path, config)
