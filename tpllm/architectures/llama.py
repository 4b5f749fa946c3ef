"""Llama, and the many models of its shape: grouped-query attention and SwiGLU.

Source: The Llama 3 Herd of Models (2024), https://arxiv.org/abs/2407.21783
"""

from typing import Any

from tpllm.architectures.decoder import attention, decoder, swiglu
from tpllm.architectures.hf_config import with_head_dim
from tpllm.architectures.spec import BlockSpec, Dimensions, ModelSpec

# Values of absent fields: the defaults of transformers' LlamaConfig.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "eos_token_id": 2,
}


def complete(where: str, config: dict[str, Any]) -> dict[str, Any]:
    return with_head_dim(where, DEFAULTS | config | {"sliding_window": None})


def spec(dims: Dimensions) -> ModelSpec:
    def block(name: str) -> BlockSpec:
        bias = dims.attention_bias
        mlp = swiglu(dims, name, bias=dims.mlp_bias)
        return BlockSpec(attention(dims, name, qkv_bias=bias, o_bias=bias), mlp)

    return decoder(dims, block)
