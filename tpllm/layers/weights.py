"""Loading of a layer's weights: the interface of a checkpoint, and the slice of each rank.

A layer with weights has `load(weights, name)`. `name` is its prefix in the checkpoint, such as
`model.layers.0.self_attn.o_proj`. The layer reads only the slice that its rank holds, so each rank
reads 1 / tp.size of the sharded tensors from disk and never holds a whole one.
"""

from typing import Protocol

from torch import Tensor

from tpllm.parallel.group import TPGroup


class WeightSource(Protocol):
    """A source of tensors by name: safetensors files, or random numbers."""

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Return tensor `name`, or only its `rows` (dimension 0) and `cols` (dimension 1).

        Nothing outside the slice is read from disk. The tensor may have any dtype and device. It
        may be a view of the file, so the caller copies it and never writes to it.

        Raises:
            ValueError: the source has no tensor of that name.
        """
        ...


def fill(target: Tensor, source: Tensor, name: str) -> None:
    """Copy `source`, the checkpoint's tensor `name`, into `target`, converting dtype and device.

    Raises:
        ValueError: the shapes differ; copying alone would broadcast a wrong tensor silently.
    """
    if source.shape != target.shape:
        raise ValueError(
            f"checkpoint tensor {name} has shape {list(source.shape)}, but the model needs "
            f"{list(target.shape)}; its config.json belongs to other weights"
        )
    target.copy_(source)


def divide(total: int, tp: TPGroup, quantity: str) -> int:
    """Return `total / tp.size`, the equal share of every rank.

    Raises:
        ValueError: `tp.size` does not divide `total`; `quantity` names it in the message.
    """
    if total % tp.size:
        raise ValueError(f"a TP group of {tp.size} ranks does not divide {quantity}={total}")
    return total // tp.size


def shard(total: int, tp: TPGroup, quantity: str) -> slice:
    """Return this rank's band of `total` rows or columns, one of `tp.size` equal bands."""
    size = divide(total, tp, quantity)
    return slice(tp.rank * size, (tp.rank + 1) * size)
