"""Read the rotary embedding from a Hugging Face config.json: its base and how it is scaled."""

import math
from collections.abc import Callable
from typing import Any

from tpllm.architectures.hf_config import positive, refuse
from tpllm.architectures.spec import Rope
from tpllm.checks import check_bool

DEFAULT_THETA = 10000.0  # of every family in transformers

_ORIGINAL = "original_max_position_embeddings"

# Of each kind: the fields that it needs, and those that it may have. Not here: "dynamic" and
# "longrope", whose frequencies depend on the length of the longest sequence in the batch.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
    "yarn": (
        {"factor"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        | {_ORIGINAL},
    ),
}
_MEANINGLESS = {"rope_theta", "rope_type", "type", _ORIGINAL}
_ONES = {"factor", "attention_factor", "partial_rotary_factor"}  # without effect where they are 1


def read_rope(where: str, config: dict[str, Any]) -> Rope:
    """Return the rotary embedding of a complete config.

    It stands in rope_parameters, in older files in rope_scaling, which takes precedence.

    Raises:
        ValueError: it is of a kind that we do not implement, or a field is wrong or missing.
    """
    theta = _read_theta(where, config)
    ropes = {
        field: _read(where, config, field, theta)
        for field in ("rope_scaling", "rope_parameters")
        if config.get(field)
    }
    if len(set(ropes.values())) > 1:
        raise ValueError(f"{where} gives two rotary embeddings: {' and '.join(ropes)}; drop one")
    return next(iter(ropes.values()), Rope(theta))


def with_overrides(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a config with other fields. A rotary embedding replaces the old one in both spellings.

    It keeps the old rope_theta, unless it has one of its own.
    """
    spellings = ("rope_scaling", "rope_parameters")
    if new := [overrides[each] for each in spellings if overrides.get(each)]:
        theta = _read_theta("config.json", config)
        config = {name: value for name, value in config.items() if name not in spellings}
        config.pop("rope_theta", None)
        if not any(isinstance(each, dict) and "rope_theta" in each for each in new):
            config["rope_theta"] = theta
    return config | overrides


def _read(where: str, config: dict[str, Any], field: str, theta: float) -> Rope:
    given = config[field]
    kind = given.get("rope_type", given.get("type")) if isinstance(given, dict) else None
    kind = "default" if kind is None else kind
    if not isinstance(given, dict) or kind not in list(FIELDS):
        refuse(where, config, field, f"rotary embeddings of rope_type {', '.join(FIELDS)}")
    fields = {name: value for name, value in given.items() if value is not None}
    needed, possible = FIELDS[kind]
    for name, value in fields.items():
        if name not in _MEANINGLESS | needed | possible and not (name in _ONES and value == 1):
            refuse(where, config, field, f"rope_type={kind!r} without {name}")
    if lacking := needed - fields.keys():
        refuse(where, config, field, f"rope_type={kind!r} only with {', '.join(sorted(lacking))}")
    if kind == "default" or (kind, fields.get("factor")) == ("linear", 1):
        return Rope(theta)

    def number(name: str, default: float) -> float:
        return positive(where, f"{field}.{name}", fields.get(name, default))

    factor = number("factor", 1)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    original = config.get(_ORIGINAL)  # as in transformers, it takes precedence over the one inside
    if original is None:
        original = fields.get(_ORIGINAL, config["max_position_embeddings"])
    original = positive(where, _ORIGINAL, original)
    if kind == "llama3":
        low, high = number("low_freq_factor", 1), number("high_freq_factor", 4)
        if low == high:
            raise ValueError(f"{where}: {field}.low_freq_factor={low} is high_freq_factor, too")
        return Rope(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=number("beta_fast", 32),
        beta_slow=number("beta_slow", 1),
        truncate=check_bool(f"{where}: {field}.truncate", fields.get("truncate", True)),
        attention_factor=number("attention_factor", _yarn_attention_factor(factor, number, fields)),
    )


def _yarn_attention_factor(
    factor: float, number: Callable[[str, float], float], fields: dict[str, Any]
) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return scale(number("mscale", 1)) / scale(number("mscale_all_dim", 1))
    return scale(1)


def _read_theta(where: str, config: dict[str, Any]) -> float:
    """Read rope_theta: older files have it at the top, newer ones in rope_parameters, some in both.

    rope_scaling replaces rope_parameters, and both take precedence over the top. A file with two
    different values is refused, because programs differ in which one they take.
    """
    dicts = [config, config.get("rope_parameters"), config.get("rope_scaling")]
    places = [each if isinstance(each, dict) else {} for each in dicts]
    rope = places[2] or places[1]
    theta = rope.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    found = [place["rope_theta"] for place in places if place.get("rope_theta") is not None]
    thetas = {positive(where, "rope_theta", each) for each in [theta, *found]}
    if len(thetas) > 1:
        raise ValueError(f"{where} gives two values of rope_theta: {sorted(thetas)}; drop one")
    return thetas.pop()
