"""What all layers of one rank's model have in common."""

from dataclasses import dataclass, field

import torch
from torch import nn

from tpllm.layers.attention.attention import AttentionBackend
from tpllm.layers.linear.matmul import Matmul, plain_matmul
from tpllm.layers.linear.weight_format import DenseWeight, LinearWeight
from tpllm.parallel.group import TPGroup


@dataclass(frozen=True)
class LayerContext:
    """The group that shards a model's layers, and what computes in them; by default plain torch.

    Attributes:
        tp: the TP group; its device holds weights and activations
        dtype: of activations, and of weights that are not in a format of their own
        weight_format: the class that stores the weights of linear layers
    """

    tp: TPGroup
    dtype: torch.dtype
    matmul: Matmul = plain_matmul
    attention_backend: AttentionBackend = field(default_factory=AttentionBackend)
    weight_format: type[LinearWeight] = DenseWeight

    def parameter(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised weight for `load` to fill, without gradient."""
        values = torch.empty(shape, dtype=self.dtype, device=self.tp.device)
        return nn.Parameter(values, requires_grad=False)
