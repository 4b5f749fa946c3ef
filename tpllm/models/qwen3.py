"""Qwen3, dense: a decoder-only transformer with grouped-query attention and per-head QK-norm.

Shape letters: N tokens, S sequences, H query heads, K key/value heads, D head_dim, E hidden_size,
I intermediate_size, V vocab_size. H, K and I are this rank's share inside a block; hidden states
[N, E] are whole and equal on every rank.

The N tokens are those of all sequences in a step or in a micro-batch, concatenated without padding;
`batch` maps tokens to sequences. The residual stream is passed beside the hidden states, so that
each norm adds and normalises in one pass over memory. Embedding, attention and MLP return this
rank's partial sums; the norm that follows all-reduces them.

Source: Qwen3 Technical Report (2025), https://arxiv.org/abs/2505.09388
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tpllm.config.model_config import ModelConfig
from tpllm.layers.activation import silu_and_mul
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.attention.attention import Attention, KVCache
from tpllm.layers.context import LayerContext
from tpllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tpllm.layers.linear.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    kv_head_shard,
)
from tpllm.layers.rotary import QKNormRope, rotary_cos_sin
from tpllm.layers.weights import WeightSource, fill
from tpllm.models.micro_batch import MicroBatch

# per micro-batch: the last block's output, partial sums [N, E], and the residual stream [N, E]
States = list[tuple[Tensor, Tensor | None]]


class Qwen3Attention(nn.Module):
    """Norm, QKV projection, norm and rotation of q and k, KV store, attention, projection."""

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
    ) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.norm = _norm(config, context)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            heads,
            kv_heads,
            config.head_dim,
            context,
            bias=config.attention_bias,
        )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim,
            config.hidden_size,
            context,
            bias=config.attention_bias,
        )
        self.q_norm = context.parameter(config.head_dim)
        self.k_norm = context.parameter(config.head_dim)
        self.num_heads = self.qkv_proj.local_num_heads
        self.num_kv_heads = self.qkv_proj.local_num_kv_heads
        self.attention = Attention(
            self.num_heads, self.num_kv_heads, config.head_dim, context.attention_backend
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: MicroBatch,
        cos_sin: Tensor,
        kv_cache: KVCache,
    ) -> tuple[Tensor, Tensor]:
        # [N, (H + 2K) * D]
        qkv, residual = self.qkv_proj(
            x, norm=self.norm, residual=residual, copy_stream=batch.copy_stream
        )
        rope = QKNormRope(self.q_norm, self.k_norm, self.eps, batch.positions, cos_sin)
        x = self.attention(qkv, *kv_cache, batch.attention, rope)  # [N, H * D]
        return self.o_proj(x), residual  # [N, E]

    def load(self, weights: WeightSource, name: str) -> None:
        self.qkv_proj.load(weights, [f"{name}.{letter}_proj" for letter in "qkv"])
        self.o_proj.load(weights, f"{name}.o_proj")
        fill(self.q_norm, weights.read(f"{name}.q_norm.weight"), f"{name}.q_norm.weight")
        fill(self.k_norm, weights.read(f"{name}.k_norm.weight"), f"{name}.k_norm.weight")


class Qwen3MLP(nn.Module):
    """Norm, then SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.norm = _norm(config, context)
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, context
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, context)

    def forward(self, x: Tensor, residual: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        x, residual = self.gate_up_proj(
            x,
            norm=self.norm,
            residual=residual,
            activation=silu_and_mul,
            copy_stream=batch.copy_stream,
        )  # [N, I]
        return self.down_proj(x), residual  # [N, E]

    def load(self, weights: WeightSource, name: str) -> None:
        self.gate_up_proj.load(weights, [f"{name}.gate_proj", f"{name}.up_proj"])
        self.down_proj.load(weights, f"{name}.down_proj")


class Qwen3DecoderLayer(nn.Module):
    """Attention, then MLP. The next norm adds the output of each to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, context)
        self.mlp = Qwen3MLP(config, context)

    def forward(
        self,
        states: States,
        micro_batches: Sequence[MicroBatch],
        cos_sin: Tensor,
        kv_cache: KVCache,
    ) -> States:
        """Run each block for every micro-batch: one computes while another is all-reduced."""
        attended, outputs = [], []
        for (x, residual), batch in zip(states, micro_batches, strict=True):
            with batch.computing():
                attended.append(self.self_attn(x, residual, batch, cos_sin, kv_cache))
        for (x, residual), batch in zip(attended, micro_batches, strict=True):
            with batch.computing():
                outputs.append(self.mlp(x, residual, batch))
        return outputs

    def load(self, weights: WeightSource, name: str) -> None:
        self.self_attn.norm.load(weights, f"{name}.input_layernorm")
        self.self_attn.load(weights, f"{name}.self_attn")
        self.mlp.norm.load(weights, f"{name}.post_attention_layernorm")
        self.mlp.load(weights, f"{name}.mlp")


class Qwen3Model(nn.Module):
    """Embedding, the decoder layers, and the final norm: token ids [N] to hidden states [N, E]."""

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        max_positions: int,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, context) for _ in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, context)
        self.cos_sin = rotary_cos_sin(
            config.head_dim, max_positions, config.rope_theta, context.tp.device
        )

    def forward(
        self, micro_batches: Sequence[MicroBatch], kv_caches: list[KVCache]
    ) -> list[Tensor]:
        states: States = []
        for batch in micro_batches:
            with batch.computing():
                states.append((self.embed_tokens(batch.input_ids), None))
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            states = layer(states, micro_batches, self.cos_sin, kv_cache)
        return [
            self.norm(x, residual, batch.copy_stream)[0]
            for (x, residual), batch in zip(states, micro_batches, strict=True)
        ]

    def load(self, weights: WeightSource, name: str) -> None:
        self.embed_tokens.load(weights, f"{name}.embed_tokens")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Qwen3DecoderLayer)
            layer.load(weights, f"{name}.layers.{i}")
        self.norm.load(weights, f"{name}.norm")


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 with its LM head, as a worker runs it.

    Args:
        max_positions: the longest sequence in tokens; the rotary table has this number of rows

    Attributes:
        num_layers, local_num_kv_heads, head_dim: a token's share of this rank's KV cache is
            `2 * num_layers * local_num_kv_heads * head_dim` elements
        lm_head: the columns of the logits are `local_vocab_size` ids from its `vocab_start` on

    Raises:
        ValueError: `tp.size` does not divide the model; `ModelConfig.check_parallel` checks this
            before any worker starts.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        max_positions: int,
    ) -> None:
        super().__init__()
        self.model = Qwen3Model(config, context, max_positions)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, context)
        self.tied = config.tie_word_embeddings
        if self.tied:
            self.lm_head.tie_to(self.model.embed_tokens)
        self.num_layers = config.num_hidden_layers
        kv_heads = kv_head_shard(config.num_key_value_heads, context.tp)
        self.local_num_kv_heads = kv_heads.stop - kv_heads.start
        self.head_dim = config.head_dim

    def forward(self, micro_batches: Sequence[MicroBatch], kv_caches: list[KVCache]) -> Tensor:
        """Run the N tokens of a step through the model and write their keys and values.

        Args:
            micro_batches: those of the step; each attends to itself and to the ones before it
            kv_caches: a pair per layer, each [num_blocks, block_size, local_num_kv_heads, head_dim]

        Returns:
            Hidden states [N, E] after the final norm, equal on every rank.
        """
        hidden: list[Tensor] = self.model(micro_batches, kv_caches)
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits [S, Vl] of this rank's vocabulary for hidden [S, E], the sampled rows.

        If `out` is given, they are written to it.
        """
        logits: Tensor = self.lm_head(hidden, out)
        return logits

    def load(self, weights: WeightSource) -> None:
        self.model.load(weights, "model")
        if not self.tied:
            self.lm_head.load(weights, "lm_head")


def _norm(config: ModelConfig, context: LayerContext) -> AllReduceRMSNorm:
    return AllReduceRMSNorm(config.hidden_size, config.rms_norm_eps, context)
