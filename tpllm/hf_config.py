"""Reads a Hugging Face config.json: every field checked, and what we do not implement refused."""

import reprlib
from pathlib import Path
from typing import Any

from tpllm.checks import check_bool, check_choice, check_int, check_number, read_json

DTYPES = ("float16", "bfloat16", "float32")

# Far above any model yet, far below what would overflow 32-bit indices or stall on a typing error.
MAX_SIZES = {
    "vocab_size": 10**6,  # an id has 20 bits where tokens are put in order
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**28,
}


def read_fields(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that `config`, the folder's config.json, gives.

    Raises:
        ValueError: a field is missing, of the wrong type or out of range; the file and the field
            are named.
    """
    where = str(folder / "config.json")
    sizes = {
        field: check_int(f"{where}: {field}", _require(where, config, field), 1, maximum)
        for field, maximum in MAX_SIZES.items()
    }
    _check_heads(where, sizes)
    return {
        **sizes,
        "rms_norm_eps": _positive(where, "rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        "rope_theta": _read_rope_theta(where, config),
        "tie_word_embeddings": _flag(where, config, "tie_word_embeddings"),
        "attention_bias": _flag(where, config, "attention_bias"),
        "initializer_range": _positive(
            where, "initializer_range", config.get("initializer_range", 0.02)
        ),
        "dtype": _read_dtype(where, config),
        "eos_token_ids": _read_eos_token_ids(folder, config, sizes["vocab_size"]),
    }


def refuse_unimplemented(where: str, config: dict[str, Any]) -> None:
    """Refuse, by its name, every config field whose meaning we would otherwise ignore.

    Raises:
        ValueError: the model needs something that tpllm does not implement.
    """

    def refuse(field: str, value: object, only: str) -> None:
        short = reprlib.repr(value)  # a quantization_config can be pages long
        raise ValueError(f"{where}: {field}={short} is not implemented; tpllm runs {only}")

    if config.get("quantization_config") is not None:
        refuse("quantization_config", config["quantization_config"], "float checkpoints")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], "hidden_act='silu'")
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        refuse("sliding_window", config["sliding_window"], "full attention")
    if config.get("partial_rotary_factor", 1) != 1:
        refuse("partial_rotary_factor", config["partial_rotary_factor"], "full rotary embeddings")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}
    ):
        refuse("layer_types", layer_types, "layers of full_attention")
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if rope is not None and not _is_default_rope(rope):
            refuse(field, rope, "rotary embeddings without scaling (rope_type='default')")


def _is_default_rope(rope: object) -> bool:
    """Whether it says no more than rope_theta. Older files call rope_type just type."""
    if not isinstance(rope, dict) or set(rope) - {"rope_theta", "rope_type", "type"}:
        return False
    return all(rope.get(key, "default") == "default" for key in ("rope_type", "type"))


def _require(where: str, config: dict[str, Any], field: str) -> Any:
    if config.get(field) is None:
        raise ValueError(f"{where} has no {field}; is it the config.json of a whole checkpoint?")
    return config[field]


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


def _read_rope_theta(where: str, config: dict[str, Any]) -> float:
    """Older files give rope_theta at the top, newer ones in rope_parameters, some in both."""
    places = [config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
    found = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    if not found:
        raise ValueError(f"{where} has no rope_theta, neither at the top nor in rope_parameters")
    thetas = {_positive(where, "rope_theta", theta) for theta in found}
    if len(thetas) > 1:
        raise ValueError(f"{where} gives two values of rope_theta: {sorted(thetas)}; drop one")
    return thetas.pop()


def _read_dtype(where: str, config: dict[str, Any]) -> str:
    """Newer files say dtype, older ones torch_dtype; a file with neither means float32."""
    field = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(field)
    return "float32" if value is None else check_choice(f"{where}: {field}", value, DTYPES)


def _read_eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """End tokens of both files, in order, each once: chat models often have two or more."""
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


def _positive(where: str, field: str, value: object) -> float:
    number = check_number(f"{where}: {field}", value)
    if number <= 0:
        raise ValueError(f"{where}: {field}={number} must be more than 0")
    return number
