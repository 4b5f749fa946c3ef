"""Qwen2 and Qwen2.5, dense: Llama's blocks with biases of queries, keys and values.

Source: Qwen2.5 Technical Report (2024), https://arxiv.org/abs/2412.15115
"""

from typing import Any

from tpllm.architectures.decoder import attention, decoder, swiglu
from tpllm.architectures.hf_config import with_head_dim
from tpllm.architectures.qwen3 import DEFAULTS, without_sliding_window
from tpllm.architectures.spec import BlockSpec, Dimensions, ModelSpec


def complete(where: str, config: dict[str, Any]) -> dict[str, Any]:
    config = DEFAULTS | {"head_dim": None} | config  # else transformers' defaults are Qwen3's
    return with_head_dim(where, without_sliding_window(where, config))


def spec(dims: Dimensions) -> ModelSpec:
    return decoder(
        dims, lambda name: BlockSpec(attention(dims, name, qkv_bias=True), swiglu(dims, name))
    )
