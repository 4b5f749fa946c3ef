"""The interface of a model to its worker, and the model class of each architecture."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from tpllm.architectures.registry import family_named
from tpllm.layers.attention.attention import KVCache
from tpllm.layers.embedding import ParallelLMHead
from tpllm.layers.weights import WeightSource
from tpllm.models.micro_batch import MicroBatch


class CausalLM(Protocol):
    """A rank's shard of a language model; see `tpllm.models.qwen3` for shapes and meanings."""

    num_layers: int
    local_num_kv_heads: int
    head_dim: int
    lm_head: ParallelLMHead

    def __call__(self, micro_batches: Sequence[MicroBatch], kv_caches: list[KVCache]) -> Tensor: ...

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor: ...

    def load(self, weights: WeightSource) -> None: ...


def model_class(architecture: str) -> Any:
    """Return the class that runs an architecture; only its module is imported."""
    module, name = family_named(architecture).model_class.split(":")
    return getattr(import_module(module), name)
