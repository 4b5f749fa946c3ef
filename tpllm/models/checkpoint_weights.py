"""Sources of a model's weights: a checkpoint's safetensors files, or random numbers.

Both implement `WeightSource` (see `tpllm.layers.weights`). Tensors carry the names of Hugging
Face's checkpoints, such as `model.layers.0.mlp.up_proj.weight`.
"""

import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tpllm.architectures.decoder import EMBEDDING, HEAD
from tpllm.architectures.spec import ModelSpec
from tpllm.config.checkpoint_files import read_tensors, stored_name


class SafetensorsWeights:
    """The safetensors files of a local checkpoint folder, opened once and read slice by slice.

    Files are memory-mapped, so only the bytes of a slice are read from disk, and the ranks of a
    host share one copy in the page cache. A returned tensor is a view of the file, on the CPU:
    layers on a GPU copy directly from it into their parameters, without a second buffer on the GPU.

    Args:
        folder: a checkpoint folder that `tpllm.config.checkpoint` has checked

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored = read_tensors(folder)
        files = {tensor.file for tensor in self._stored.values()}
        # Never closed explicitly: a mapping ends with the last tensor that views it.
        self._opened: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in files}

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Return tensor `name`, or only its `rows` and `cols`.

        Raises:
            ValueError: no file of the folder holds `name`.
        """
        stored = stored_name(name, self._stored)
        if stored is None and name == EMBEDDING:  # some store a tied weight only as the head
            stored = stored_name(HEAD, self._stored)
        if stored is None:
            raise ValueError(f"checkpoint {self.folder} has no tensor {name}")
        opened = self._opened[self._stored[stored].file]
        return _slice(opened.get_slice(stored), rows, cols)


class DummyWeights:
    """Random weights of a model's shapes, to measure speed or test without a checkpoint.

    Weights are normal(0, `initializer_range`), norms are 1. The full tensor is generated from a
    seed made of its name and then sliced, so every TP size runs the same model. CPU and GPU
    generate different numbers.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.shapes = spec.shapes()
        self.std = spec.initializer_range
        self.device = device
        self.dtype = dtype

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Return tensor `name`, or only its `rows` and `cols`.

        Raises:
            ValueError: the model has no tensor `name`.
        """
        if name not in self.shapes:
            raise ValueError(f"the model has no tensor {name}")
        full = torch.empty(self.shapes[name], device=self.device, dtype=self.dtype)
        if name.endswith("norm.weight"):
            full.fill_(1)
        else:
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            full.normal_(0, self.std, generator=generator)
        return _slice(full, rows, cols)


def _slice(tensor: Any, rows: slice | None, cols: slice | None) -> Tensor:
    """Return rows and columns of a tensor or safetensors slice; a 1-D tensor has no columns."""
    index = (rows or slice(None),) if cols is None else (rows or slice(None), cols)
    sliced: Tensor = tensor[index]
    return sliced
