"""Tests that damaged and hostile checkpoints are refused with their cause before a worker starts.

Only `EngineConfig.resolve` runs here, which starts no process.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.checkpoints import shipped_config, write_config
from tpllm.architectures.hf_config import MAX_SIZES
from tpllm.config.checkpoint_files import INDEX_NAME, WEIGHTS_NAME
from tpllm.config.engine_config import EngineConfig
from tpllm.config.model_config import ModelConfig

SIZES = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 1}
EMBEDDING = "model.embed_tokens.weight"


def write_checkpoint(folder: Path) -> Path:
    """Write a small complete checkpoint."""
    config = ModelConfig.from_folder(write_config(folder, **SIZES, eos_token_id=None))
    tensors = {name: np.ones(shape, np.float16) for name, shape in config.spec.shapes().items()}
    save_file(tensors, folder / WEIGHTS_NAME)
    return folder


def resolve(folder: Path) -> EngineConfig:
    return EngineConfig.resolve(folder, device="cpu", skip_tokenizer_init=True)


def test_the_undamaged_checkpoint_is_accepted(tmp_path):
    resolve(write_checkpoint(tmp_path))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and the bytes that follow it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a damage that changes the header and keeps the data."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / WEIGHTS_NAME)
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def with_length(length: int) -> Callable[[Path], None]:
    """Return a damage that states a wrong length of the header."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS_NAME).read_bytes()
        (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", length) + content[8:])

    return damage


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a damage that replaces a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def write_a_gigabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)  # a hole: it takes no room


def index(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a damage that replaces the index of a sharded checkpoint."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS_NAME).rename(folder / "a.safetensors")  # it would go before an index
        make(folder / INDEX_NAME)

    return damage


def index_to(file: object) -> Callable[[Path], None]:
    return index(lambda path: path.write_text(json.dumps({"weight_map": {EMBEDDING: file}})))


def write_little(path: Path) -> None:
    """Return an index to a file that has one of the tensors."""
    save_file({EMBEDDING: np.ones((16, 8), np.float16)}, path.with_name("b.safetensors"))
    path.write_text(json.dumps({"weight_map": {EMBEDDING: "b.safetensors"}}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "header of no length": with_length(0),
    "header longer than the file": with_length(1 << 20),
    "header of 8 exabytes": with_length(1 << 63),
    "header of all lengths": with_length(2**64 - 1),
    "header that is no JSON": with_header(lambda h: b"{" * 100),
    "header that is a list": with_header(lambda h: b"[]"),
    "header nested without end": with_header(lambda h: b'{"a":' * 50_000),
    "header that is no Unicode": with_header(lambda h: b'{"\xff\xfe": 1}'),
    "header with a tensor of text": with_header(lambda h: h.update({EMBEDDING: "x"})),
    "unknown type": with_header(lambda h: h[EMBEDDING].update(dtype="F9")),
    "shape larger than the data": with_header(lambda h: h[EMBEDDING].update(shape=[16, 800])),
    "shape that overflows": with_header(lambda h: h[EMBEDDING].update(shape=[2**62, 2**62])),
    "negative shape": with_header(lambda h: h[EMBEDDING].update(shape=[-16, 8])),
    "offsets beyond the end": with_header(
        lambda h: h[EMBEDDING].update(data_offsets=[1 << 40, (1 << 40) + 256])
    ),
    "offsets that run backwards": with_header(
        lambda h: h[EMBEDDING].update(data_offsets=h[EMBEDDING]["data_offsets"][::-1])
    ),
    "two tensors in one place": with_header(
        lambda h: h["model.norm.weight"].update(
            data_offsets=h["model.layers.0.input_layernorm.weight"]["data_offsets"]
        )
    ),
    "a tensor left out": with_header(lambda h: h.pop(EMBEDDING)),
    "a tensor too many": with_header(
        lambda h: h.update({"model.extra": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}})
    ),
    "whole numbers": with_header(lambda h: h[EMBEDDING].update(dtype="I16")),
    "another shape": with_header(lambda h: h[EMBEDDING].update(shape=[8, 16])),
    "weights that are a folder": replaced(WEIGHTS_NAME, Path.mkdir),
    "weights that are a pipe": replaced(WEIGHTS_NAME, os.mkfifo),
    "weights that link to nothing": replaced(WEIGHTS_NAME, lambda p: p.symlink_to("gone")),
    "weights that link to themselves": replaced(WEIGHTS_NAME, lambda p: p.symlink_to(p.name)),
    "weights that nobody finds": replaced(WEIGHTS_NAME, lambda p: None),
    "config that is a pipe": replaced("config.json", os.mkfifo),
    "config that links to itself": replaced("config.json", lambda p: p.symlink_to(p.name)),
    "config without end": replaced("config.json", lambda p: p.symlink_to("/dev/zero")),
    "config of a gigabyte": replaced("config.json", write_a_gigabyte),
    "config nested without end": replaced("config.json", lambda p: p.write_bytes(b"[" * 200_000)),
    "index that is a link to itself": index(lambda p: p.symlink_to(p.name)),
    "index that is a folder": index(Path.mkdir),
    "index of a gigabyte": index(write_a_gigabyte),
    "index that leads up": index_to("../model.safetensors"),
    "index that leads to the root": index_to("/etc/passwd"),
    "index with a zero byte": index_to("a\0.safetensors"),
    "index with a backslash": index_to("..\\a.safetensors"),
    "index with a newline": index_to("a\n.safetensors"),
    "index with a name too long": index_to("a" * 5000 + ".safetensors"),
    "index with a number": index_to(7),
    "index to what is not there": index_to("other.safetensors"),
    "index that knows too little": index(write_little),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(name, tmp_path):
    DAMAGES[name](write_checkpoint(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        resolve(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert len(str(raised.value)) < 20_000


def test_a_file_cut_anywhere_is_refused(tmp_path):
    file = write_checkpoint(tmp_path) / WEIGHTS_NAME
    whole = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    places = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(whole) - 1}
    for length in sorted(places | set(range(0, len(whole), len(whole) // 40))):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
            resolve(tmp_path)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**300, -(10**300)]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
FIELDS = sorted({*MAX_SIZES, *shipped_config()})


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), HOSTILE, min_size=1, max_size=3))
def test_a_hostile_config_is_read_or_refused_by_name(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shipped_config() | changes))
    try:
        EngineConfig.resolve(tmp_path, device="cpu", load_format="dummy")
    except ValueError as error:
        assert any(field in str(error) for field in [*changes, "rope_theta", "num_attention_heads"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused_by_folder(content, tmp_path):
    from tpllm.text.tokenizer import Tokenizer

    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="no tokenizer can be read from"):
        Tokenizer(tmp_path).load()


def test_no_pickle_is_ever_read(tmp_path):
    """A folder with only a pickled checkpoint has no weights that tpllm reads."""
    folder = write_checkpoint(tmp_path)
    (folder / WEIGHTS_NAME).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        resolve(folder)
