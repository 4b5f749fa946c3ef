"""Llama, as another family would be added: what follows from its spec is in `test_llama.py`."""

from typing import Any

from tpllm.architectures.decoder import attention, decoder, swiglu
from tpllm.architectures.hf_config import refuse
from tpllm.architectures.registry import Family
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
}


def complete(where: str, config: dict[str, Any]) -> dict[str, Any]:
    config = DEFAULTS | config
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            refuse(where, config, field, f"{field}=False")
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    return config | {"head_dim": head_dim}


def spec(dims: Dimensions) -> ModelSpec:
    return decoder(dims, lambda name: BlockSpec(attention(dims, name), swiglu(dims, name)))


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    blocks="tests.models.llama_blocks:blocks",
    complete=complete,
    spec=spec,
)
