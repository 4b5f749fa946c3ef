"""Family: what the package must know of a model family, without its layers."""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from tpllm.architectures.spec import Dimensions, ModelSpec


@dataclass(frozen=True)
class Family:
    """A model family, by the names in config.json.

    Attributes:
        architecture: in `architectures`
        without_head: the name in `architectures` of the model without its LM head
        model_type: counts if no architecture is named
        blocks: the module and the name of the function that makes its blocks; only a worker
            imports it
        complete: returns the content of config.json with the family's values of absent fields;
            refuses what the family does not implement. Its first argument names the file
        spec: states the model with these dimensions
    """

    architecture: str
    without_head: str
    model_type: str
    blocks: str
    complete: Callable[[str, dict[str, Any]], dict[str, Any]]
    spec: Callable[[Dimensions], ModelSpec]


def refuse(where: str, config: dict[str, Any], field: str, only: str) -> NoReturn:
    """Refuse a field of config.json by name and value; `only` is what tpllm runs instead."""
    short = reprlib.repr(config[field])  # a quantization_config can be pages long
    raise ValueError(f"{where}: {field}={short} is not implemented; tpllm runs {only}")
