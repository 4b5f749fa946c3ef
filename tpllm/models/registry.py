"""What a worker needs of a model, and the way from a checkpoint's architecture to its class."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from tpllm.config.model_config import ARCHITECTURES, ModelConfig
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


def model_class(config: ModelConfig) -> Any:
    """Class of `config.architecture`; its module is imported only now, one family at a time.

    The table of names lives in `tpllm.config.model_config`, which must not import torch: an unknown
    architecture is refused there, before any worker starts.
    """
    module, name = ARCHITECTURES[config.architecture].split(":")
    return getattr(import_module(module), name)
