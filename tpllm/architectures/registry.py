"""The model families that tpllm runs, and what the package must know of each without its layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpllm.architectures import llama, mistral, qwen2, qwen3
from tpllm.architectures.spec import Dimensions, ModelSpec


@dataclass(frozen=True)
class Family:
    """A model family, by the names in config.json.

    Attributes:
        architecture: in `architectures`
        model_type: counts if no architecture is named
        blocks: the module and the name of the function that makes its blocks; only a worker
            imports it
        complete: returns the content of config.json with the family's values of absent fields;
            refuses what the family does not implement. Its first argument names the file
        spec: states the model with these dimensions
    """

    architecture: str
    model_type: str
    blocks: str
    complete: Callable[[str, dict[str, Any]], dict[str, Any]]
    spec: Callable[[Dimensions], ModelSpec]

    @property
    def without_head(self) -> str:
        """The name in `architectures` of the model without its LM head."""
        return self.architecture.replace("ForCausalLM", "Model")


_DENSE = "tpllm.models.dense:blocks"
FAMILIES = [
    Family("Qwen3ForCausalLM", "qwen3", _DENSE, qwen3.complete, qwen3.spec),
    Family("Qwen2ForCausalLM", "qwen2", _DENSE, qwen2.complete, qwen2.spec),
    Family("LlamaForCausalLM", "llama", _DENSE, llama.complete, llama.spec),
    Family("MistralForCausalLM", "mistral", _DENSE, mistral.complete, mistral.spec),
]


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
    possible = FAMILIES if model_type is None else [by_type[model_type]]
    if not named and model_type is not None:
        return possible[0]
    for architecture in named if isinstance(named, list) else []:
        for family in possible:
            if architecture in (family.architecture, family.without_head):
                return family
    known = ", ".join(family.architecture for family in possible)
    if model_type is not None:
        known += f" for model_type={model_type!r}"
    raise ValueError(f"{where}: architectures={named!r} is not implemented; tpllm runs {known}")


def family_named(architecture: str) -> Family:
    """Return the family of a known architecture."""
    return next(family for family in FAMILIES if family.architecture == architecture)
