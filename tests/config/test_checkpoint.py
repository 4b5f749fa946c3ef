import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoints import write_config, write_weights
from tpllm.architectures.decoder import EMBEDDING, HEAD
from tpllm.config.checkpoint import check_checkpoint, resolve_model
from tpllm.config.checkpoint_files import INDEX_NAME, WEIGHTS_NAME, read_tensors
from tpllm.config.model_config import ModelConfig


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
    assert check_checkpoint(folder, config) == config
    assert {each.file for each in read_tensors(folder).values()} == {folder / WEIGHTS_NAME}


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
    shapes = config.spec.shapes()
    write_weights(tmp_path / "a.safetensors", {EMBEDDING: shapes.pop(EMBEDDING)})
    write_weights(tmp_path / "b.safetensors", shapes)
    write_weights(tmp_path / "c.safetensors", {EMBEDDING: (1,)})  # in no index
    write_index(tmp_path, {EMBEDDING: "a.safetensors"} | dict.fromkeys(shapes, "b.safetensors"))
    assert check_checkpoint(tmp_path, config) == config
    tensors = read_tensors(tmp_path)
    assert tensors.pop(EMBEDDING).file == tmp_path / "a.safetensors"
    assert {each.file for each in tensors.values()} == {tmp_path / "b.safetensors"}


def test_a_single_file_goes_before_an_index_whatever_that_is(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.spec.shapes())
    write_index(tmp_path, {EMBEDDING: "gone.safetensors"})
    assert check_checkpoint(tmp_path, config) == config
    (tmp_path / INDEX_NAME).write_text("{")
    assert check_checkpoint(tmp_path, config) == config


def test_a_file_that_an_index_names_is_read_whole(tmp_path, config):
    """As transformers reads it: also what the index puts elsewhere, or nowhere."""
    write_weights(tmp_path / "a.safetensors", config.spec.shapes())
    write_weights(tmp_path / "b.safetensors", {EMBEDDING: (1,), "model.norm.weight": (8,)})
    write_index(tmp_path, {EMBEDDING: "a.safetensors"})
    assert check_checkpoint(tmp_path, config) == config
    write_index(tmp_path, {EMBEDDING: "a.safetensors", "model.norm.weight": "b.safetensors"})
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[1\]"):  # the last file's
        check_checkpoint(tmp_path, config)


def write_arrays(path: Path, config: ModelConfig, **changed: np.ndarray | None) -> None:
    """Write a file of ones, and some arrays of other values; None leaves one out."""
    arrays = {name: np.ones(s, np.float16) for name, s in config.spec.shapes().items()}
    arrays |= {NAMES[name]: array for name, array in changed.items() if array is not None}
    for name, array in changed.items():
        if array is None:
            del arrays[NAMES[name]]
    save_file(arrays, path)


NAMES = {"head": HEAD, "embedding": EMBEDDING}


def test_a_tied_model_takes_a_head_that_differs(tmp_path, config):
    """Whether it does is seen in the weights alone."""
    assert config.tie_word_embeddings
    path, same = tmp_path / WEIGHTS_NAME, np.ones((16, 8), np.float16)
    write_arrays(path, config, head=same)
    assert check_checkpoint(tmp_path, config).tie_word_embeddings
    other = same.copy()
    other[-1, -1] = 2
    for head in (other, same.astype(np.float32)):
        write_arrays(path, config, head=head)
        checked = check_checkpoint(tmp_path, config)
        assert not checked.tie_word_embeddings
        assert HEAD in checked.spec.shapes()
    write_arrays(path, config, head=same, embedding=None)
    assert check_checkpoint(tmp_path, config).tie_word_embeddings


def test_head_and_embedding_in_two_files_are_compared(tmp_path, config):
    shapes = config.spec.shapes() | {HEAD: (16, 8)}
    write_weights(tmp_path / "b.safetensors", {HEAD: shapes.pop(HEAD), "model.norm.weight": (8,)})
    write_weights(tmp_path / "a.safetensors", shapes)
    write_index(tmp_path, {EMBEDDING: "a.safetensors", HEAD: "b.safetensors"})
    assert check_checkpoint(tmp_path, config).tie_word_embeddings
    save_file({HEAD: np.full((16, 8), 3, np.float16)}, tmp_path / "b.safetensors")
    assert not check_checkpoint(tmp_path, config).tie_word_embeddings


def test_a_model_whose_head_is_missing_is_refused_with_what_may_be_wrong(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.spec.shapes())
    untied = replace(config, tie_word_embeddings=False)
    message = r"lacks tensors .*: lm_head.weight. If its head is its embedding, config.json must"
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path, untied)
    write_arrays(tmp_path / WEIGHTS_NAME, config, embedding=None)
    with pytest.raises(ValueError, match=r"lacks tensors .* \(1\): model.embed_tokens.weight"):
        check_checkpoint(tmp_path, config)


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.position_ids",
    ],
)
def test_what_a_model_computes_by_itself_may_be_left_over(tmp_path, config, name):
    shapes = config.spec.shapes() | {name: (3,)}
    arrays = {n: np.zeros(s, np.int64 if n == name else np.float16) for n, s in shapes.items()}
    save_file(arrays, tmp_path / WEIGHTS_NAME)
    assert check_checkpoint(tmp_path, config) == config


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",  # of a layer that config.json denies
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
        "lm_head.bias",
        "score.weight",
    ],
)
def test_what_we_do_not_implement_is_refused_by_name(tmp_path, config, name):
    write_weights(tmp_path / WEIGHTS_NAME, config.spec.shapes() | {name: (3,)})
    with pytest.raises(ValueError, match=rf"has unknown tensors .* \(1\): {name}"):
        check_checkpoint(tmp_path, config)


def test_an_adapter_is_refused_by_name(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.spec.shapes())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json: LoRA is not implemented; merge"):
        check_checkpoint(tmp_path, config)


@pytest.mark.parametrize("rename", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"])
def test_the_prefix_may_be_missing_or_there_twice(tmp_path, config, rename):
    untied = replace(config, tie_word_embeddings=False)
    shapes = {rename(name): shape for name, shape in untied.spec.shapes().items()}
    write_weights(tmp_path / WEIGHTS_NAME, shapes)
    assert check_checkpoint(tmp_path, untied) == untied


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_config_without_dtype_has_that_of_the_weights(tmp_path, config, dtype):
    arrays = {name: np.zeros(s, dtype) for name, s in config.spec.shapes().items()}
    save_file(arrays, tmp_path / WEIGHTS_NAME)
    checked = check_checkpoint(tmp_path, replace(config, dtype=None))
    assert checked.dtype == np.dtype(dtype).name


def test_missing_tensors_are_named(tmp_path, config):
    shapes = config.spec.shapes()
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
    write_weights(tmp_path / WEIGHTS_NAME, config.spec.shapes() | {"model.extra": (1,)})
    with pytest.raises(ValueError, match=r"has unknown tensors .* \(1\): model.extra"):
        check_checkpoint(tmp_path, config)


def test_misshapen_tensors_are_named_with_both_shapes(tmp_path, config):
    write_weights(tmp_path / WEIGHTS_NAME, config.spec.shapes() | {EMBEDDING: (15, 8)})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is \[15, 8\], not \[16, 8\]"):
        check_checkpoint(tmp_path, config)


def test_weights_that_are_no_floats_are_refused(tmp_path, config):
    shapes = config.spec.shapes()
    save_file({name: np.zeros(s, np.int8) for name, s in shapes.items()}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="is I8, not one of F16, BF16, F32"):
        check_checkpoint(tmp_path, config)


def test_a_folder_without_weights_is_refused(tmp_path, config):
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor model.safe"):
        check_checkpoint(tmp_path, config)


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model.bin"], "It has pytorch_model.bin, which is not read: convert it to saf"),
        (["model-q4.gguf"], "It has model-q4.gguf, which is not read"),
        (["model.fp16.safetensors"], "rename a single file to model.safetensors"),
        (
            [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)],
            r"00003-of-00004.safetensors, ...: rename a single file .*, or fetch the index",
        ),
    ],
)
def test_weights_of_other_names_and_kinds_are_refused_with_what_to_do(
    tmp_path, config, files, message
):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=f"has neither model.safetensors nor .*{message}"):
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
