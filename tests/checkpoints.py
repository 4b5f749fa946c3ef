"""Checkpoint folders for tests: the shipped config.json with changes, and weights to match."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tpllm.config.checkpoint import resolve_model

DROP = object()  # as a field's value: leave the field out


def shipped_config(**changes: Any) -> dict[str, Any]:
    """Return the shipped model's config.json with some fields changed."""
    config = json.loads((resolve_model(None) / "config.json").read_text()) | changes
    return {field: value for field, value in config.items() if value is not DROP}


def write_config(folder: Path, **changes: Any) -> Path:
    """Write that config.json into `folder`, and return the folder."""
    (folder / "config.json").write_text(json.dumps(shipped_config(**changes)))
    return folder


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of zeros in float16."""
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, path)
