"""Llama's blocks, as another family would be added: its spec is in `tests/architectures/llama.py`.

N tokens, E hidden_size, D head_dim; H query heads and K key/value heads of this rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tpllm.architectures.spec import AttentionSpec, ModelSpec
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.attention.attention import Attention
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import Linear
from tpllm.layers.rotary import rotary_cos_sin
from tpllm.models.micro_batch import BlockContext
from tpllm.models.mlp import SwiGLU


class LlamaAttention(nn.Module):
    """Norm, QKV projection, rotation of q and k, KV store, attention, output projection."""

    def __init__(
        self, spec: AttentionSpec, layer: int, cos_sin: Tensor, context: LayerContext
    ) -> None:
        super().__init__()
        self.layer = layer
        self.cos_sin = cos_sin
        self.norm = AllReduceRMSNorm(spec.norm, context)
        self.qkv_proj = Linear(spec.qkv, context)
        self.heads = spec.local_heads(context.tp.size)
        self.attention = Attention(*self.heads, spec.head_dim, context.attention_backend)
        self.o_proj = Linear(spec.o, context)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor | None]:
        batch = context.batch
        qkv, residual = self.qkv_proj(
            x, norm=self.norm, residual=residual, copy_stream=batch.copy_stream
        )  # [N, (H + 2K) * D]
        kv_cache = context.kv_caches[self.layer]
        H, K = self.heads
        cos, sin = self.cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)  # [N, 1, D/2]
        q, k, v = qkv.view(len(qkv), H + 2 * K, -1).split([H, K, K], dim=1)  # [N, heads, D]
        for heads in (q, k):
            low, high = heads.chunk(2, dim=-1)
            heads.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))
        for cache, heads in zip(kv_cache, (k, v), strict=True):
            cache.flatten(0, 1)[batch.attention.slot_mapping] = heads
        x = self.attention(qkv, *kv_cache, batch.attention)  # [N, H * D]
        return self.o_proj(x, residual=residual)  # [N, E]


def blocks(spec: ModelSpec, context: LayerContext, max_positions: int) -> Iterator[nn.Module]:
    cos_sin = rotary_cos_sin(spec.head_dim, max_positions, spec.rope_theta, context.tp.device)
    for layer, block in enumerate(spec.blocks):
        yield LlamaAttention(block.attention, layer, cos_sin, context)
        yield SwiGLU(block.mlp, context)
