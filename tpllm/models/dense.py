"""The blocks of dense decoders, such as Qwen3 and Llama: grouped-query attention and SwiGLU.

N tokens, E hidden_size, D head_dim; H query heads and K key/value heads of this rank.

Sources: LLaMA (2023), https://arxiv.org/abs/2302.13971; the norms of queries and keys as in the
Qwen3 Technical Report (2025), https://arxiv.org/abs/2505.09388
"""

from collections.abc import Iterator

from torch import Tensor, nn

from tpllm.architectures.spec import AttentionSpec, ModelSpec
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.attention.attention import Attention
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import Linear
from tpllm.layers.norm import RMSNorm
from tpllm.layers.rotary import QKNormRope, rotary_cos_sin
from tpllm.models.micro_batch import BlockContext
from tpllm.models.mlp import SwiGLU


class SelfAttention(nn.Module):
    """Norm, QKV projection, rotation of q and k, KV store, attention, projection.

    In some families q and k are normed before the rotation.

    Args:
        layer: index of its KV cache
        cos_sin: [L, D] fp32, from `rotary_cos_sin`; the blocks share it
    """

    def __init__(
        self, spec: AttentionSpec, layer: int, cos_sin: Tensor, context: LayerContext
    ) -> None:
        super().__init__()
        self.layer = layer
        self.cos_sin = cos_sin
        self.norm = AllReduceRMSNorm(spec.norm, context)
        self.qkv_proj = Linear(spec.qkv, context)
        norms = spec.qk_norms
        self.q_norm = RMSNorm(norms[0], context) if norms else None
        self.k_norm = RMSNorm(norms[1], context) if norms else None
        heads = spec.local_heads(context.tp.size)
        self.attention = Attention(*heads, spec.head_dim, context.attention_backend)
        self.o_proj = Linear(spec.o, context)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        batch = context.batch
        qkv, residual = self.qkv_proj(
            x, norm=self.norm, residual=residual, copy_stream=batch.copy_stream
        )  # [N, (H + 2K) * D]
        rope = QKNormRope(batch.positions, self.cos_sin)
        if self.q_norm is not None and self.k_norm is not None:
            weights = (self.q_norm.weight, self.k_norm.weight)
            rope = QKNormRope(batch.positions, self.cos_sin, weights, self.q_norm.eps)
        x = self.attention(qkv, *context.kv_caches[self.layer], batch.attention, rope)  # [N, H * D]
        return self.o_proj(x, residual=residual)  # [N, E]


def blocks(spec: ModelSpec, context: LayerContext, max_positions: int) -> Iterator[nn.Module]:
    """Yield the blocks of a model for sequences of at most `max_positions` tokens."""
    cos_sin = rotary_cos_sin(spec.head_dim, max_positions, spec.rope, context.tp.device)
    for layer, block in enumerate(spec.blocks):
        yield SelfAttention(block.attention, layer, cos_sin, context)
        yield SwiGLU(block.mlp, context)
