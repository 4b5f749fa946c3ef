"""The model families that tpllm runs."""

from typing import Any

from tpllm.architectures.family import Family
from tpllm.architectures.qwen3 import QWEN3

FAMILIES = [QWEN3]


def family_of(where: str, config: dict[str, Any]) -> Family:
    """Return the family of the first known architecture of config.json, or of its model type.

    Raises:
        ValueError: there is none; `where` names the file.
    """
    named, model_type = config.get("architectures"), config.get("model_type")
    by_type = {family.model_type: family for family in FAMILIES}
    if model_type is not None and model_type not in list(by_type):
        raise ValueError(
            f"{where}: model_type={model_type!r} is not implemented; tpllm runs "
            f"{', '.join(by_type)}"
        )
    if not named and model_type is not None:
        return by_type[model_type]
    for architecture in named if isinstance(named, list) else []:
        for family in FAMILIES:
            if architecture in (family.architecture, family.without_head):
                return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ValueError(f"{where}: architectures={named!r} is not implemented; tpllm runs {known}")


def family_named(architecture: str) -> Family:
    """Return the family of a known architecture."""
    return next(family for family in FAMILIES if family.architecture == architecture)
