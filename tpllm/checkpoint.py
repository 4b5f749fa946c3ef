"""Finds a model's folder, and checks its safetensors files by their headers alone.

A header lists every tensor's type, shape and place in the file, so a missing, truncated or foreign
checkpoint is refused in milliseconds, before any worker starts.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tpllm.checks import read_json
from tpllm.model_config import ModelConfig
from tpllm.panics import panics_as_errors

SHIPPED_MODEL = Path(__file__).parent / "assets" / "tiny-qwen3"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # which file holds which tensor, if there are many

# In the folder itself: an index must not lead elsewhere.
FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")

FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")  # as safetensors writes them


def resolve_model(model: str | None, *, setting: str = "model", weights: bool = True) -> Path:
    """The absolute folder of a model.

    Args:
        model: a local folder, or a Hugging Face id, which is downloaded into the Hub's cache
            unless it is there; None for the small model that ships with tpllm
        setting: the keyword to name in errors
        weights: whether the safetensors files of a Hugging Face id are wanted too

    Raises:
        FileNotFoundError: there is no such folder, nor such a model on the Hub.
        ValueError: `model` is a file.
    """
    if model is None:
        return SHIPPED_MODEL
    path = os.path.expanduser(model)  # os.path: pathlib raises on names the system finds too long
    if os.path.isdir(path):
        return Path(path).absolute()
    if os.path.isfile(path):
        raise ValueError(f"{setting}={model!r} is a file; give the folder that holds it")
    return _download(model, setting, weights)


def _download(model: str, setting: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        folder = snapshot_download(
            model,
            allow_patterns=[*patterns, "*.safetensors"] if weights else patterns,
            ignore_patterns=["*/*"],  # copies in other formats live in subfolders
        )
    except HFValidationError:
        raise FileNotFoundError(f"{setting}={model!r}: there is no such folder") from None
    except OSError as error:  # offline, unknown, or not open to everyone: all are OSErrors there
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"{setting}={model!r} is neither a local folder nor to be had from the Hugging Face "
            f"Hub ({reason[0] if reason else type(error).__name__})"
        ) from error
    return Path(folder)


def check_checkpoint(folder: Path, config: ModelConfig) -> dict[str, Path]:
    """The file of each tensor the model needs, after checking that they are as it needs them.

    Raises:
        FileNotFoundError: a safetensors file is missing.
        ValueError: a file is damaged; a tensor is missing, unknown, misshapen or no float.
    """
    expected = config.tensor_shapes()
    # A tied checkpoint may carry its embedding a second time. It must be whole, but is not read.
    allowed = {"lm_head.weight": (config.vocab_size, config.hidden_size), **expected}
    files: dict[str, Path] = {}
    wrong: list[str] = []
    for file, names in _files(folder).items():
        for name, (dtype, shape) in _read_header(file).items():
            if names is not None and name not in names:
                continue  # the index takes this tensor from another file, or not at all
            if name in allowed and shape != allowed[name]:
                wrong.append(f"{name} is {list(shape)}, not {list(allowed[name])}")
            if name in allowed and dtype not in FLOAT_DTYPES:
                wrong.append(f"{name} is {dtype}, not one of {', '.join(FLOAT_DTYPES)}")
            files[name] = file
    _refuse(folder, config, "lacks", expected.keys() - files.keys())
    _refuse(folder, config, "has unknown", files.keys() - allowed.keys())
    _refuse(folder, config, "has misfit", wrong)
    return {name: files[name] for name in expected}


def _refuse(folder: Path, config: ModelConfig, what: str, found: Iterable[str]) -> None:
    names = sorted(found)
    if names:
        first = "; ".join(names[:4]) + ("; ..." if len(names) > 4 else "")
        raise ValueError(
            f"the checkpoint in {folder} {what} tensors for the {config.architecture} of its "
            f"config.json ({len(names)}): {first}"
        )


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Each safetensors file of the checkpoint, with the tensors to take from it (None: all)."""
    if os.path.lexists(folder / INDEX_NAME):  # also a link to nowhere: it was meant
        return _read_index(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; "
            "load_format='dummy' runs without weights"
        )
    return {weights: None}


def _read_index(folder: Path) -> dict[Path, set[str] | None]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must name the file of each tensor")
    files: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise ValueError(
                f"{index}: {tensor} is in {file!r}, which is no plain name of a safetensors file"
            )
        files.setdefault(folder / file, set()).add(tensor)
    checked: dict[Path, set[str] | None] = {}
    for path, tensors in files.items():
        if not os.path.isfile(path):  # os.path: pathlib raises on names the system finds too long
            raise FileNotFoundError(f"{path} is missing, and {index} puts {min(tensors)} in it")
        checked[path] = tensors
    return checked


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a safetensors file, whose length is checked too."""
    try:
        with panics_as_errors("safetensors"), safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); fetch it again") from error
