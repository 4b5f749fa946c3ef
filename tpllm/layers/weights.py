"""Loading of a layer's weights: the interface of a checkpoint, and of the layers that read it.

A layer finds names, shapes and its rank's slices in its spec (`tpllm.architectures.spec`). It reads
only what its rank holds, so each rank reads 1 / tp.size of the sharded tensors from disk and never
holds a whole one.
"""

from typing import Protocol

from torch import Tensor, nn


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


class Layer(nn.Module):
    """A module with weights of its own."""

    def load(self, weights: WeightSource) -> None:
        """Read this rank's shard.

        Raises:
            ValueError: the source lacks a tensor, or has it in another shape.
        """
        raise NotImplementedError


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
