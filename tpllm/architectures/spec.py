"""What a decoder-only model is, as plain data: its blocks, and of every weight the name, the shape
and how the TP ranks divide it.

A family (`tpllm.architectures.registry`) turns the fields of config.json into a `ModelSpec`. The
check of checkpoints, the layers and their loading, estimates of memory, the hardware's limit and
the warm-up of kernels all read this one statement. Nothing here needs torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: its base, and how its frequencies are scaled for longer contexts.

    Names and defaults are those of transformers' `rope_parameters`.

    Attributes:
        original_max_position_embeddings: tokens of the contexts before scaling
        low_freq_factor, high_freq_factor: of llama3, bounds in periods per original context
        beta_fast, beta_slow, truncate: of yarn, bounds in rotations per original context, and
            whether they are rounded to whole dimensions
        attention_factor: of cosines and sines
    """

    theta: float
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """A model's sizes and constants, under the names of Hugging Face's config.json.

    Attributes:
        tie_word_embeddings: whether the LM head is the embedding
        sliding_window: tokens that each token sees, itself included; None for all before it
        initializer_range: the standard deviation of dummy weights
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    initializer_range: float

    @property
    def longest_context(self) -> int:
        """Tokens that the rotary embedding is made for, as vLLM derives them."""
        rope, length = self.rope, float(self.max_position_embeddings)
        if rope.rope_type == "yarn":
            length = rope.original_max_position_embeddings
        return int(length * rope.factor) if rope.rope_type in ("linear", "yarn") else int(length)


@dataclass(frozen=True)
class Sharding:
    """How the ranks of a TP group divide one dimension of a weight: in whole units, such as heads.

    Attributes:
        dim: 0 to divide the output features (column-parallel) or the vocabulary, 1 to divide the
            input features (row-parallel)
        num_units: units in the dimension
        quantity: the config's name for `num_units`, for errors
        uneven: what follows if the group's size does not divide `num_units`: "refuse"; "pad", the
            last ranks hold fewer units (vocabulary); "repeat", neighbouring ranks hold the same
            unit if there are fewer units than ranks (KV heads)
    """

    dim: Literal[0, 1]
    num_units: int
    quantity: str
    uneven: Literal["refuse", "pad", "repeat"] = "refuse"

    def conflict(self, size: int) -> str | None:
        """Return why `size` ranks cannot divide the units, for an error; None if they can."""
        total = f"{self.quantity}={self.num_units}"
        if self.uneven == "repeat" and self.num_units % size and size % self.num_units:
            return f"neither divides nor is a multiple of {total}"
        if self.uneven == "refuse" and self.num_units % size:
            return f"does not divide {total}"
        return None

    def local_units(self, size: int) -> int:
        """Return the units for which each of `size` ranks has room."""
        return -(-self.num_units // size)

    def units(self, rank: int, size: int) -> range:
        """Return the units that a rank holds."""
        if self.uneven == "repeat" and self.num_units < size:
            unit = rank * self.num_units // size
            return range(unit, unit + 1)
        local = self.local_units(size)
        return range(self.num_units)[rank * local : (rank + 1) * local]


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint, such as `model.layers.0.self_attn.q_proj.weight`
        shape: of the whole tensor, [out_features, in_features] for a linear layer
        sharding: None if every rank holds the whole tensor
    """

    name: str
    shape: tuple[int, ...]
    sharding: Sharding | None = None

    def local_shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of the shard that each of `size` ranks holds."""
        if self.sharding is None:
            return self.shape
        dim, units = self.sharding.dim, self.sharding.num_units
        shape = list(self.shape)
        shape[dim] = shape[dim] // units * self.sharding.local_units(size)
        return tuple(shape)

    def shard(self, rank: int, size: int) -> tuple[slice | None, slice | None]:
        """Return the rows and the columns of a rank's shard; None for all of them."""
        if self.sharding is None:
            return None, None
        unit = self.shape[self.sharding.dim] // self.sharding.num_units
        units = self.sharding.units(rank, size)
        band = slice(units.start * unit, units.stop * unit)
        return (band, None) if self.sharding.dim == 0 else (None, band)


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer: one weight, or several over the same input joined along the output.

    Attributes:
        name: short, and equal in all blocks: "qkv", "o", "gate_up", "down" or "lm_head"
        weights: [out_features, in_features] each
        biases: one for each weight, or none
    """

    name: str
    weights: tuple[WeightSpec, ...]
    biases: tuple[WeightSpec, ...] = ()

    def has_bias(self, rank: int) -> bool:
        """Whether a rank adds a bias. Rank 0 alone adds that of partial sums.

        If every rank added it, the all-reduce would count it several times.
        """
        return any(bias.sharding or rank == 0 for bias in self.biases)

    def local_shape(self, size: int) -> tuple[int, int]:
        """Return [out_features, in_features] of the joined weight on each of `size` ranks."""
        shapes = [weight.local_shape(size) for weight in self.weights]
        return sum(shape[0] for shape in shapes), shapes[0][1]


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm over the last dimension."""

    weight: WeightSpec
    eps: float


@dataclass(frozen=True)
class AttentionSpec:
    """Norm, QKV projection, rotation, attention over the KV cache, output projection.

    Attributes:
        qk_norms: the norms of each query head and of each key head before the rotation, or none
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: NormSpec
    qkv: LinearSpec
    o: LinearSpec
    qk_norms: tuple[NormSpec, NormSpec] | None = None

    def local_heads(self, size: int) -> tuple[int, int]:
        """Return the query heads and the key/value heads of each of `size` ranks."""
        rows = [weight.local_shape(size)[0] for weight in self.qkv.weights]
        return rows[0] // self.head_dim, rows[1] // self.head_dim


@dataclass(frozen=True)
class MLPSpec:
    """Norm, then SwiGLU: `down(silu(gate(x)) * up(x))`."""

    norm: NormSpec
    gate_up: LinearSpec
    down: LinearSpec


@dataclass(frozen=True)
class BlockSpec:
    """A decoder block: attention, then MLP."""

    attention: AttentionSpec
    mlp: MLPSpec

    def linears(self) -> tuple[LinearSpec, ...]:
        return self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down

    def norms(self) -> tuple[NormSpec, ...]:
        return self.attention.norm, self.mlp.norm, *(self.attention.qk_norms or ())

    def weights(self) -> Iterator[WeightSpec]:
        for linear in self.linears():
            yield from linear.weights + linear.biases
        yield from (norm.weight for norm in self.norms())


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: embedding, blocks, final norm, LM head.

    Attributes:
        embedding: [vocab_size, hidden_size]
        head: the projection to the vocabulary; without weights in the checkpoint if `tied`
        tied: whether the head's weight is the embedding's
        head_dim, rope: of the rotary embedding
        initializer_range: the standard deviation of dummy weights
    """

    embedding: WeightSpec
    blocks: tuple[BlockSpec, ...]
    norm: NormSpec
    head: LinearSpec
    tied: bool
    head_dim: int
    rope: Rope
    initializer_range: float

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.embedding.shape[1]

    def weights(self) -> Iterator[WeightSpec]:
        """Yield every tensor that a checkpoint must hold."""
        yield self.embedding
        for block in self.blocks:
            yield from block.weights()
        yield self.norm.weight
        if not self.tied:
            yield from self.head.weights

    def linears(self) -> tuple[LinearSpec, ...]:
        """Return the linear layers of the first block, and the head."""
        return *self.blocks[0].linears(), self.head

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the whole shape of every tensor that a checkpoint must hold, by name."""
        return {weight.name: weight.shape for weight in self.weights()}

    def local_size(self, tp_size: int) -> int:
        """Return the number of elements of the weights on each of `tp_size` ranks."""
        return sum(math.prod(weight.local_shape(tp_size)) for weight in self.weights())

    def conflict(self, tp_size: int) -> str | None:
        """Return why `tp_size` ranks cannot divide the model, for an error; None if they can."""
        conflicts = (sharding.conflict(tp_size) for sharding in self._shardings())
        return next((each for each in conflicts if each is not None), None)

    def tp_sizes(self) -> list[int]:
        """Return the group sizes that can divide the model."""
        most = min(each.num_units for each in self._shardings() if each.uneven == "refuse")
        return [size for size in range(1, most + 1) if self.conflict(size) is None]

    def _shardings(self) -> list[Sharding]:
        """Return every different sharding once, in the order of the weights."""
        return list(dict.fromkeys(each.sharding for each in self.weights() if each.sharding))
