"""Mistral, dense: Llama's blocks without biases. Its first versions have a sliding window.

Source: Mistral 7B (2023), https://arxiv.org/abs/2310.06825
"""

from typing import Any

from tpllm.architectures.decoder import attention, decoder, swiglu
from tpllm.architectures.hf_config import with_head_dim
from tpllm.architectures.spec import BlockSpec, Dimensions, ModelSpec

# Values of absent fields: the defaults of transformers' MistralConfig.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "eos_token_id": 2,
    "sliding_window": 4096,
}


def complete(where: str, config: dict[str, Any]) -> dict[str, Any]:
    return with_head_dim(where, DEFAULTS | config)


def spec(dims: Dimensions) -> ModelSpec:
    return decoder(dims, lambda name: BlockSpec(attention(dims, name), swiglu(dims, name)))
