"""What all layers of one rank's model have in common."""

from dataclasses import dataclass, field

import torch

from tpllm.layers.attention.attention import AttentionBackend, TorchAttentionBackend
from tpllm.layers.linear.matmul import Matmul, plain_matmul
from tpllm.parallel.group import TPGroup


@dataclass(frozen=True)
class LayerContext:
    """The group that shards a model's layers, and what computes in them; by default plain torch.

    Attributes:
        tp: the TP group; its device holds weights and activations
        dtype: of weights and activations
    """

    tp: TPGroup
    dtype: torch.dtype
    matmul: Matmul = plain_matmul
    attention_backend: AttentionBackend = field(default_factory=TorchAttentionBackend)
