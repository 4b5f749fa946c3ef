"""ModelConfig: the model that a checkpoint's config.json describes, checked field by field.

This module needs no torch: a model that we cannot run is refused before any worker starts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tpllm.checks import read_json
from tpllm.config.hf_config import read_fields, refuse_unimplemented

# Architecture in config.json -> module and name of its class.
ARCHITECTURES = {"Qwen3ForCausalLM": "tpllm.models.qwen3:Qwen3ForCausalLM"}
# Other names: the model without its head, and the model type if no architecture is named.
SYNONYMS = {"Qwen3Model": "Qwen3ForCausalLM"}
MODEL_TYPES = {"qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's shapes and constants, under the names of Hugging Face's config.json.

    Attributes:
        name: for messages; the checkpoint folder's name or the last part of a Hub id
        dtype: of the checkpoint's weights: "float16", "bfloat16" or "float32"; None if
            config.json has none, until `check_checkpoint` reads the headers of the weights
        tie_word_embeddings: whether the LM head is the embedding: the value of config.json, until
            `check_checkpoint` compares the two
        eos_token_ids: every token that ends a text, those of generation_config.json first
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    initializer_range: float
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: Path, name: str | None = None) -> Self:
        """Read config.json, and the end tokens of generation_config.json if it exists.

        Raises:
            FileNotFoundError: the folder has no config.json.
            ValueError: a field is out of range, or asks for what we do not implement.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json; give the folder of a Hugging Face checkpoint"
            )
        config = read_json(path)
        architecture = _check_architecture(path, config)
        refuse_unimplemented(str(path), config)
        return cls(
            name=name or folder.resolve().name,
            architecture=architecture,
            **read_fields(folder, config),
        )

    def check_parallel(self, tensor_parallel_size: int) -> None:
        """Check that the model can be split over so many ranks.

        Query heads and the MLP are split evenly. KV heads are split evenly, too; if there are fewer
        KV heads than ranks, the same number of ranks holds each of them.

        Raises:
            ValueError: it cannot; the message lists the sizes that can.
        """
        conflict = self._conflict(tensor_parallel_size)
        if conflict is not None:
            sizes = [
                size
                for size in range(1, self.num_attention_heads + 1)
                if self._conflict(size) is None
            ]
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} {conflict} of {self.name}; "
                f"use one of {sizes}"
            )

    def _conflict(self, tp: int) -> str | None:
        kv_heads = self.num_key_value_heads
        if self.num_attention_heads % tp:
            return f"does not divide num_attention_heads={self.num_attention_heads}"
        if kv_heads % tp and tp % kv_heads:
            return f"neither divides nor is a multiple of num_key_value_heads={kv_heads}"
        if self.intermediate_size % tp:
            return f"does not divide intermediate_size={self.intermediate_size}"
        return None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, [out_features, in_features] for a linear layer.

        A tied model has no lm_head.weight.
        """
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        layer = self._layer_shapes()
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        projections = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        for name, shape in projections.items():
            shapes[f"{name}.weight"] = shape
            if self.attention_bias:
                shapes[f"{name}.bias"] = shape[:1]
        return shapes


def _check_architecture(path: Path, config: dict[str, Any]) -> str:
    """Return the first known architecture of the file, or the one of its model type."""
    named, model_type = config.get("architectures"), config.get("model_type")
    if model_type is not None and model_type not in list(MODEL_TYPES):
        raise ValueError(
            f"{path}: model_type={model_type!r} is not implemented; tpllm runs "
            f"{', '.join(MODEL_TYPES)}"
        )
    if not named and model_type is not None:
        return MODEL_TYPES[model_type]
    for architecture in named if isinstance(named, list) else []:
        architecture = SYNONYMS.get(str(architecture), architecture)
        if isinstance(architecture, str) and architecture in ARCHITECTURES:
            return architecture
    raise ValueError(
        f"{path}: architectures={named!r} is not implemented; tpllm runs {', '.join(ARCHITECTURES)}"
    )
