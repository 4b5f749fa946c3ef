"""ModelConfig: the model that a checkpoint's config.json describes, checked field by field.

This module needs no torch: a model that we cannot run is refused before any worker starts.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tpllm.architectures.hf_config import read_fields, refuse_unimplemented
from tpllm.architectures.hf_rope import read_rope, with_overrides
from tpllm.architectures.registry import family_named, family_of
from tpllm.architectures.spec import Dimensions, ModelSpec
from tpllm.checks import read_json


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Dimensions):
    """A model's dimensions and what else its folder says of it.

    Attributes (besides those of Dimensions):
        name: for messages; the checkpoint folder's name or the last part of a Hub id
        dtype: of the checkpoint's weights: "float16", "bfloat16" or "float32"; None if
            config.json has none, until `check_checkpoint` reads the headers of the weights
        tie_word_embeddings: the value of config.json, until `check_checkpoint` compares the two
        eos_token_ids: every token that ends a text, those of generation_config.json first
    """

    name: str
    architecture: str
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(
        cls, folder: Path, name: str | None = None, overrides: dict[str, Any] | None = None
    ) -> Self:
        """Read config.json, and the end tokens of generation_config.json if it exists.

        `overrides` are fields of config.json with other values.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: a field is out of range, or asks for what we do not implement.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json; give the folder of a Hugging Face checkpoint"
            )
        config, where = read_json(path), str(path)
        if overrides:
            config, where = with_overrides(config, overrides), f"{path} with hf_overrides"
        family = family_of(where, config)
        refuse_unimplemented(where, config)
        config = family.complete(where, config)
        return cls(
            name=name or folder.resolve().name,
            architecture=family.architecture,
            **read_fields(folder, config),
            rope=read_rope(where, config),
        )

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's blocks and weights, as its family states them."""
        return family_named(self.architecture).spec(self)

    def check_parallel(self, tensor_parallel_size: int) -> None:
        """Check that the model can be split over so many ranks.

        Raises:
            ValueError: it cannot; the message lists the sizes that can.
        """
        conflict = self.spec.conflict(tensor_parallel_size)
        if conflict is not None:
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} {conflict} of {self.name}; "
                f"use one of {self.spec.tp_sizes()}"
            )
