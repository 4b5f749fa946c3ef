"""Read the fields of a Hugging Face config.json that all families share, and check each.

A family adds the values of absent fields (`tpllm.architectures.registry.Family.complete`).
"""

import reprlib
from pathlib import Path
from typing import Any, NoReturn

from tpllm.checks import check_bool, check_choice, check_int, check_number, read_json

DTYPES = ("float16", "bfloat16", "float32")

# Far above any model, and far below values that overflow 32-bit indices or take hours.
MAX_SIZES = {
    "vocab_size": 10**6,  # the sort of tokens packs an id into 20 bits
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**28,
}

# Of fields that change a model: the values that we implement, and what that means.
IMPLEMENTED: dict[str, tuple[list[Any], str]] = {
    "quantization_config": ([None], "float checkpoints"),
    "per_layer_config": ([None], "models whose layers are all alike"),
    "transformers_weights": ([None], "model.safetensors, or what its index names"),
    "hidden_act": (["silu", "swish"], "hidden_act='silu'"),  # two names for one function
    "partial_rotary_factor": ([None, 1], "full rotary embeddings"),
    "attn_logit_softcapping": ([None], "attention without a cap on its scores"),
    "final_logit_softcapping": ([None], "models without a cap on their logits"),
    "logit_scale": ([None, 1], "unscaled logits"),
}


def read_fields(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig in `config`, the folder's config.json, which is complete.

    Raises:
        ValueError: a field is of the wrong type or out of range; the file and the field are named.
    """
    where = str(folder / "config.json")
    sizes = _read_sizes(where, config)
    _check_heads(where, sizes)
    return {
        **sizes,
        "rms_norm_eps": positive(where, "rms_norm_eps", config["rms_norm_eps"]),
        "tie_word_embeddings": _flag(where, config, "tie_word_embeddings"),
        "sliding_window": _read_sliding_window(where, config),
        "attention_bias": _flag(where, config, "attention_bias"),
        "mlp_bias": _flag(where, config, "mlp_bias"),
        "initializer_range": positive(where, "initializer_range", config["initializer_range"]),
        "dtype": _read_dtype(where, config),
        "eos_token_ids": _read_eos_token_ids(folder, config, sizes["vocab_size"]),
    }


def with_head_dim(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with a head_dim; if absent, it is hidden_size / num_attention_heads."""
    if config["head_dim"] is not None:
        return config
    fields = ("hidden_size", "num_attention_heads")
    width, heads = (check_int(f"{where}: {field}", config[field], 1) for field in fields)
    return config | {"head_dim": width // heads}


def refuse_unimplemented(where: str, config: dict[str, Any]) -> None:
    """Refuse every field that changes a model of any family in a way that we do not implement.

    Raises:
        ValueError: the model needs something that tpllm does not implement.
    """
    for field, (values, only) in IMPLEMENTED.items():
        if field in config and config[field] not in values:
            refuse(where, config, field, only)
    layer_types = config.get("layer_types")
    if layer_types is not None and not _are_full_attention(layer_types):
        refuse(where, config, "layer_types", "layers of full_attention")


def refuse(where: str, config: dict[str, Any], field: str, only: str) -> NoReturn:
    """Refuse a field of config.json by name and value; `only` is what tpllm runs instead."""
    short = reprlib.repr(config[field])  # a quantization_config can be pages long
    raise ValueError(f"{where}: {field}={short} is not implemented; tpllm runs {only}")


def positive(where: str, field: str, value: object) -> float:
    """Return a number that must be more than 0."""
    number = check_number(f"{where}: {field}", value)
    if number <= 0:
        raise ValueError(f"{where}: {field}={number} must be more than 0")
    return number


def _are_full_attention(layer_types: object) -> bool:
    return isinstance(layer_types, list) and not set(map(str, layer_types)) - {"full_attention"}


def _read_sizes(where: str, config: dict[str, Any]) -> dict[str, int]:
    if config["num_key_value_heads"] is None:
        config = {**config, "num_key_value_heads": config["num_attention_heads"]}
    return {
        field: check_int(f"{where}: {field}", config[field], 1, maximum)
        for field, maximum in MAX_SIZES.items()
    }


def _check_heads(where: str, sizes: dict[str, int]) -> None:
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
        )
    if sizes["head_dim"] % 2:
        raise ValueError(
            f"{where}: head_dim={sizes['head_dim']} must be even: rotary embeddings turn pairs"
        )


def _read_sliding_window(where: str, config: dict[str, Any]) -> int | None:
    window = config["sliding_window"]
    return None if window is None else check_int(f"{where}: sliding_window", window, 1)


def _read_dtype(where: str, config: dict[str, Any]) -> str | None:
    """Read the dtype: newer files call it dtype, older ones torch_dtype; some have neither."""
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(field)
    return None if value is None else check_choice(f"{where}: {field}", value, DTYPES)


def _read_eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Return the end tokens of both files, in order, each once: chat models often have several."""
    ids: list[int] = []
    generation = folder / "generation_config.json"
    files = [(folder / "config.json", config)]
    if generation.is_file():
        files.insert(0, (generation, read_json(generation)))
    for path, content in files:
        value = content.get("eos_token_id")
        for id_ in value if isinstance(value, list) else [value]:
            if id_ is not None:
                ids.append(check_int(f"{path}: eos_token_id", id_, 0, vocab_size - 1))
    return tuple(dict.fromkeys(ids))


def _flag(where: str, config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    return False if value is None else check_bool(f"{where}: {field}", value)
