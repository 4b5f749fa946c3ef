"""The safetensors files of a checkpoint, and the tensors in their headers.

The rules follow transformers, because users have tried their checkpoints with it.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from tpllm.checks import read_json
from tpllm.errors import panics_as_errors

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # which file holds which tensor, if there are many
PREFIX = "model."

# In the folder itself: an index must not lead elsewhere.
FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_FOREIGN = (".bin", ".pt", ".pth", ".gguf", ".npz", ".msgpack", ".h5")


class StoredTensor(NamedTuple):
    """A tensor's file, with the type and shape in the header of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint's files. If two files hold one, the last file counts.

    Raises:
        FileNotFoundError: a safetensors file is missing.
        ValueError: a file is damaged.
    """
    return {
        name: StoredTensor(file, dtype, shape)
        for file in _files(folder)
        for name, (dtype, shape) in _read_header(file).items()
    }


def stored_name(name: str, stored: Collection[str]) -> str | None:
    """Return the name under which a checkpoint holds the tensor `name`; None if it does not.

    Checkpoints of the model without its head lack the prefix, others have it twice.
    """
    for each in (name, f"{PREFIX}{name}", name.removeprefix(PREFIX)):
        if each in stored:
            return each
    return None


def bytes_of(file: Path, name: str) -> np.ndarray:
    """Map the bytes of a tensor, [num_bytes] uint8; the file's header has been checked."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(length))[name]["data_offsets"]
    if begin == end:
        return np.empty(0, np.uint8)
    return np.memmap(file, np.uint8, "r", 8 + length + begin, (end - begin,))


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files of the checkpoint, in transformers' order."""
    weights, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if weights.is_file():  # goes before an index
        return [weights]
    if os.path.lexists(index):  # also a broken link, which is an error
        return _read_index(index)
    raise FileNotFoundError(
        f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}{_what_is_there(folder)}; "
        "load_format='dummy' runs without weights"
    )


def _what_is_there(folder: Path) -> str:
    """Return advice about weights with other names or formats, if there are some."""
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".safetensors", *_FOREIGN)
    )
    if not others:
        return ""
    found = f". It has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    if others[0].endswith(".safetensors") or others[-1].endswith(".safetensors"):
        return f"{found}: rename a single file to {WEIGHTS_NAME}, or fetch the index of several"
    return f"{found}, which is not read: convert it to safetensors"


def _read_index(index: Path) -> list[Path]:
    """Return the files that an index names. All their tensors count, also unlisted ones."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must name the file of each tensor")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise ValueError(
                f"{index}: {tensor} is in {file!r}, which is no plain name of a safetensors file"
            )
        path = index.parent / file
        if not os.path.isfile(path):  # os.path: pathlib raises on names the system finds too long
            raise FileNotFoundError(f"{path} is missing, and {index} puts {tensor} in it")
    return [index.parent / file for file in sorted(set(weight_map.values()))]


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor in a safetensors file, and check its length."""
    try:
        with panics_as_errors("safetensors"), safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); fetch it again") from error
