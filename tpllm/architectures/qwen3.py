"""Qwen3, dense: grouped-query attention with a norm of each query and key head, and SwiGLU.

Source: Qwen3 Technical Report (2025), https://arxiv.org/abs/2505.09388
"""

from typing import Any

from tpllm.architectures.decoder import attention, decoder, swiglu
from tpllm.architectures.hf_config import refuse
from tpllm.architectures.spec import BlockSpec, Dimensions, ModelSpec
from tpllm.checks import check_int

# Values of absent fields: the defaults of transformers' Qwen3Config.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def complete(where: str, config: dict[str, Any]) -> dict[str, Any]:
    return without_sliding_window(where, DEFAULTS | config)


def without_sliding_window(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with no sliding window; refuse one that is in use in some layer."""
    if config.get("layer_types") is None and _slides(where, config):
        refuse(where, config, "sliding_window", "full attention")
    return config | {"sliding_window": None}


def _slides(where: str, config: dict[str, Any]) -> bool:
    """Whether some layer has a sliding window, in a config without `layer_types`."""
    if not config.get("use_sliding_window") or config["sliding_window"] is None:
        return False
    first = check_int(f"{where}: max_window_layers", config["max_window_layers"], minimum=0)
    return first < check_int(f"{where}: num_hidden_layers", config["num_hidden_layers"], 1)


def spec(dims: Dimensions) -> ModelSpec:
    def block(name: str) -> BlockSpec:
        bias = dims.attention_bias
        each = attention(dims, name, qk_norms=True, qkv_bias=bias, o_bias=bias)
        return BlockSpec(each, swiglu(dims, name))

    return decoder(dims, block)
