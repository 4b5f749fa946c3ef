"""How a layer gets its weights: what it asks of a checkpoint, and how it keeps the answer.

A layer with weights has `load(weights, name)`, `name` being its prefix in the checkpoint, such as
`model.layers.0.self_attn.o_proj`. It asks only for the slice its rank holds, so each rank reads
1 / tp.size of the sharded tensors from disk and no rank ever holds a full one.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from tpllm.parallel.group import TPGroup


class WeightSource(Protocol):
    """Somewhere tensors come from by name: safetensors files, or random numbers."""

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Tensor `name`, or only its `rows` (first dimension) and `cols` (second): None is all.

        Nothing outside the slice is read from disk. The tensor may have any dtype and device; it
        may be a view of the file, so the caller copies it and never writes to it.

        Raises:
            ValueError: the source has no tensor of that name.
        """
        ...


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised weight, for `load` to fill; nothing here is trained: it has no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def fill(target: Tensor, source: Tensor, name: str) -> None:
    """Copy `source`, read from the checkpoint's `name`, into `target`, converting dtype and device.

    Raises:
        ValueError: the shapes differ; copying alone would broadcast a wrong tensor silently.
    """
    if source.shape != target.shape:
        raise ValueError(
            f"checkpoint tensor {name} gives {list(source.shape)} where the model needs "
            f"{list(target.shape)}; its config.json belongs to other weights"
        )
    target.copy_(source)


def divide(total: int, tp: TPGroup, what: str) -> int:
    """`total / tp.size`, the equal share of every rank.

    Raises:
        ValueError: it does not come out even; `what` names the quantity.
    """
    if total % tp.size:
        raise ValueError(f"a TP group of {tp.size} ranks does not divide {what}={total}")
    return total // tp.size


def shard(total: int, tp: TPGroup, what: str) -> slice:
    """This rank's band of `total` rows or columns: the r-th of `tp.size` equal ones."""
    size = divide(total, tp, what)
    return slice(tp.rank * size, (tp.rank + 1) * size)
