"""The specs that dense decoder-only families share, with the names of Hugging Face's checkpoints.

H query heads, K key/value heads, D head_dim, E hidden_size, I intermediate_size, V vocab_size.
"""

from collections.abc import Callable
from dataclasses import replace

from tpllm.architectures.spec import (
    AttentionSpec,
    BlockSpec,
    Dimensions,
    LinearSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    Sharding,
    WeightSpec,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def decoder(dims: Dimensions, block: Callable[[str], BlockSpec]) -> ModelSpec:
    """Return a model of blocks that are all alike; `block` makes one from its name."""
    vocabulary = Sharding(0, dims.vocab_size, "vocab_size", uneven="pad")
    shape = (dims.vocab_size, dims.hidden_size)
    return ModelSpec(
        embedding=WeightSpec(EMBEDDING, shape, vocabulary),
        blocks=tuple(block(f"model.layers.{i}") for i in range(dims.num_hidden_layers)),
        norm=norm("model.norm", dims.hidden_size, dims),
        head=LinearSpec("lm_head", (WeightSpec(HEAD, shape, vocabulary),)),
        tied=dims.tie_word_embeddings,
        head_dim=dims.head_dim,
        rope=dims.rope,
        initializer_range=dims.initializer_range,
    )


def attention(
    dims: Dimensions,
    block: str,
    *,
    qk_norms: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
) -> AttentionSpec:
    """Return grouped-query attention; the projections have biases if the flags say so."""
    H, K, D = dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim
    E, name = dims.hidden_size, f"{block}.self_attn"
    heads = Sharding(0, H, "num_attention_heads")
    kv_heads = Sharding(0, K, "num_key_value_heads", uneven="repeat")
    projections = {"q": (H * D, heads), "k": (K * D, kv_heads), "v": (K * D, kv_heads)}
    return AttentionSpec(
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        norm=norm(f"{block}.input_layernorm", E, dims),
        qkv=linear(
            "qkv",
            [(f"{name}.{k}_proj", (size, E), split) for k, (size, split) in projections.items()],
            bias=qkv_bias,
        ),
        o=linear("o", [(f"{name}.o_proj", (E, H * D), replace(heads, dim=1))], bias=o_bias),
        qk_norms=(norm(f"{name}.q_norm", D, dims), norm(f"{name}.k_norm", D, dims))
        if qk_norms
        else None,
    )


def swiglu(dims: Dimensions, block: str, *, bias: bool = False) -> MLPSpec:
    """Return the MLP `down(silu(gate(x)) * up(x))`; `bias` means one for each projection."""
    E, I, name = dims.hidden_size, dims.intermediate_size, f"{block}.mlp"
    column, row = Sharding(0, I, "intermediate_size"), Sharding(1, I, "intermediate_size")
    return MLPSpec(
        norm=norm(f"{block}.post_attention_layernorm", E, dims),
        gate_up=linear(
            "gate_up", [(f"{name}.{k}_proj", (I, E), column) for k in ("gate", "up")], bias=bias
        ),
        down=linear("down", [(f"{name}.down_proj", (E, I), row)], bias=bias),
    )


def linear(
    name: str, parts: list[tuple[str, tuple[int, int], Sharding]], *, bias: bool = False
) -> LinearSpec:
    """Join layers, each given by its name in the checkpoint, its shape and its sharding.

    The bias of a row-parallel layer is not divided.
    """
    weights = [WeightSpec(f"{each}.weight", shape, sharding) for each, shape, sharding in parts]
    biases = [
        WeightSpec(f"{each}.bias", shape[:1], None if sharding.dim else sharding)
        for each, shape, sharding in parts
    ]
    return LinearSpec(name, tuple(weights), tuple(biases) if bias else ())


def norm(name: str, size: int, dims: Dimensions) -> NormSpec:
    return NormSpec(WeightSpec(f"{name}.weight", (size,)), dims.rms_norm_eps)
