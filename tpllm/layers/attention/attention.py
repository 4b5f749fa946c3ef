"""Causal attention over a paged KV cache, behind one small interface with several backends.

N tokens, P prefill sequences, S decode sequences, B blocks per sequence, H query heads, K key/value
heads, D head_dim. The tokens of a step, or of one of its halves, are ordered: first one for each
decode sequence, then the prefill chunks one after the other. Keys and values of all of them, and of
the half before, are in the cache before attention runs.

Caches are [num_blocks, block_size, K, D]. A block table lists a sequence's blocks in order; token t
of the sequence lies in block `table[t // block_size]`. What a table holds beyond its sequence's
blocks (-1, or blocks of a row's last owner) is never used.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpllm.layers.attention.paged_decode import PagedDecode
from tpllm.layers.rotary import QKNormRope, qk_norm_rope_store

# Tokens whose pages plain torch gathers at once for decode rows, to bound the copy's memory.
_GATHERED_TOKENS = 1 << 17
# Largest mask of plain torch's prefill; with SDPA's copies it takes 6 bytes for each element.
_MASK_ELEMENTS = 1 << 25


KVCache = tuple[Tensor, Tensor]  # keys and values of a layer, each [num_blocks, block_size, K, D]


@dataclass
class PrefillBatch:
    """Sequences of which this step computes many tokens each, packed one after the other.

    A sequence may have no new tokens: padding.

    Attributes:
        cu_seqlens_q: [P + 1] int32, where in the step's tokens each one's new tokens begin, and
            where the last one's end; the first begins after the decode rows
        cu_seqlens_k: [P + 1] int32, running sum of the context lengths, new tokens included
        max_seqlen_q: most new tokens of a sequence, or more
        max_seqlen_k: longest context, in tokens, or more
        block_tables: [P, B] int32
        has_context: True if some sequence's new tokens may come after tokens already in the cache
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_tables: Tensor
    has_context: bool


@dataclass
class AttentionBatch:
    """What attention needs to know of a step.

    Attributes:
        slot_mapping: [N] int32, the cache slot of each token's key and value
        num_decode: S; the first S tokens are one each of S sequences
        context_lens: [S] int32, tokens each of them may see, itself included; 0 where a row is
            padding, and its token none of a decode row
        block_tables: [S, B] int32
        split_schedule: [parts, SPLIT_WORDS] int32, how these contexts are divided: `ContextSplit.plan`
        prefill: the remaining tokens, or None if there are none
    """

    slot_mapping: Tensor
    num_decode: int
    context_lens: Tensor
    block_tables: Tensor
    split_schedule: Tensor
    prefill: PrefillBatch | None


class AttentionBackend(Protocol):
    """One implementation of attention for the two shapes of work.

    Attributes:
        name: for messages
        capturable: True if `decode` may be captured in a CUDA graph
        prefill_capturable: likewise for `prefill`
        max_rope_rows: up to so many rows `decode` is faster with `rope` than after it
    """

    name: str
    capturable: bool
    prefill_capturable: bool
    max_rope_rows: int

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rope: QKNormRope | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One query per sequence against its cached context: q and result [S, H, D].

        The rows of `out` that are no padding get the result, where `out` is given.

        With `rope` q is a view of raw queries | keys | values, [S, (H + 2K) * D]: they are normed
        and rotated on the way, and the new keys and values stored.
        """
        ...

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: PrefillBatch,
        scale: float,
    ) -> Tensor:
        """Chunks of queries, each causal within its sequence: q and result [N, H, D].

        q, k and v [N, K, D] are those of the whole step; k and v are also found in the cache. The
        result of tokens that are in no chunk is undefined.
        """
        ...


class TorchAttentionBackend:
    """Plain torch on gathered pages: the reference, and the CPU path."""

    name = "torch"
    capturable = prefill_capturable = False  # reads lengths on the host
    max_rope_rows = 0

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rope: QKNormRope | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        assert rope is None
        num_kv_heads, head_dim = k_cache.shape[2:]
        num_blocks = -(-int(batch.context_lens.max()) // k_cache.shape[1])
        num_slots = num_blocks * k_cache.shape[1]
        tables = batch.block_tables[:, :num_blocks].clamp(min=0)  # padding is masked below
        seen = torch.arange(num_slots, device=q.device) < batch.context_lens.unsqueeze(1)
        # the query heads of a key/value head are as many queries: [S, K, H / K, D]
        grouped = q.reshape(q.shape[0], num_kv_heads, -1, head_dim)
        attended = torch.empty_like(grouped)
        rows_at_once = max(1, _GATHERED_TOKENS // num_slots)
        for first in range(0, q.shape[0], rows_at_once):
            rows = slice(first, first + rows_at_once)
            unseen = ~seen[rows, :, None, None]  # [s, num_slots, 1, 1]
            # zeroed, not just masked: a weight of zero does not silence a NaN
            k = k_cache[tables[rows]].flatten(1, 2).masked_fill_(unseen, 0).transpose(1, 2)
            v = v_cache[tables[rows]].flatten(1, 2).masked_fill_(unseen, 0).transpose(1, 2)
            mask = seen[rows, None, None, :]
            attended[rows] = F.scaled_dot_product_attention(grouped[rows], k, v, mask, scale=scale)
        attended = attended.view_as(q)
        if out is None:
            return attended
        is_row = (batch.context_lens > 0)[:, None, None]
        out[: q.shape[0]] = torch.where(is_row, attended, out[: q.shape[0]])
        return out

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: PrefillBatch,
        scale: float,
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        q_bounds, k_bounds = batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist()
        for row in range(len(q_bounds) - 1):
            new = slice(q_bounds[row], q_bounds[row + 1])
            context_len = k_bounds[row + 1] - k_bounds[row]
            if new.start == new.stop:
                continue
            row_k, row_v = k[new], v[new]
            if context_len > new.stop - new.start:
                row_k = gather_pages(k_cache, batch.block_tables[row], context_len)
                row_v = gather_pages(v_cache, batch.block_tables[row], context_len)
            out[new] = causal_attention(q[new], row_k, row_v, scale)
        return out


class SplitDecodeBackend(TorchAttentionBackend):
    """Decode by our split kernel, in any dtype; prefill by torch: for GPUs without flash-attn."""

    name = "split decode, torch prefill"
    capturable = True
    # At 8 rows one kernel takes 13.7 us where two take 15.4; at 32 there is nothing left to gain,
    # and at 256 every part of a context pays for the norms again, 4 us.
    max_rope_rows = 16

    def __init__(self) -> None:
        self._split_decode = PagedDecode()

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rope: QKNormRope | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return self._split_decode(
            q, k_cache, v_cache, batch.block_tables, batch.split_schedule, scale, rope, out
        )


class FlashAttention2Backend(SplitDecodeBackend):
    """Prefill by flash-attn 2, in fp16 and bf16; the package is imported when one is made.

    Source: Dao (2023), https://arxiv.org/abs/2307.08691
    """

    name = "split decode, flash-attn 2 prefill"
    prefill_capturable = True

    def __init__(self) -> None:
        super().__init__()
        from flash_attn import flash_attn_varlen_func

        self._varlen = flash_attn_varlen_func

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: PrefillBatch,
        scale: float,
    ) -> Tensor:
        # Without context the new tokens are all there is to see: skip the paging.
        block_table, cu_seqlens_k = None, batch.cu_seqlens_q
        if batch.has_context:
            k, v, block_table, cu_seqlens_k = (
                k_cache,
                v_cache,
                batch.block_tables,
                batch.cu_seqlens_k,
            )
        # With 1 flash-attn takes q for one token of each chunk, and ours has the decode rows, too.
        max_seqlen_q = max(2, batch.max_seqlen_q)
        out: Tensor = self._varlen(
            q,
            k,
            v,
            batch.cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            batch.max_seqlen_k,
            softmax_scale=scale,
            causal=True,
            block_table=block_table,
        )
        return out


def gather_pages(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """The first `context_len` tokens of a sequence with block_table [B]: [context_len, K, D]."""
    num_blocks = -(-context_len // cache.shape[1])
    return cache[block_table[:num_blocks]].flatten(0, 1)[:context_len]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one sequence: q [Lq, H, D], the newest of the Lk tokens of k and v [Lk, K, D].

    The last query sees every key, the one before it all but the last, and so on.
    """
    q_len, num_heads, head_dim = q.shape
    k_len, num_kv_heads = k.shape[:2]
    if 1 < q_len < k_len and q_len * k_len > _MASK_ELEMENTS:  # band by band of queries
        rows = max(1, _MASK_ELEMENTS // k_len)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for first in range(0, q_len, rows):
            band = slice(first, min(first + rows, q_len))
            seen = k_len - q_len + band.stop
            out[band] = causal_attention(q[band], k[:seen], v[:seen], scale)
        return out
    group = num_heads // num_kv_heads  # query heads that share a key/value head
    # Key/value heads are the batch and their query heads the heads. With `enable_gqa` instead, fp32
    # on a GPU falls back to a [H, Lq, Lk] matrix of scores: 34 GB for 16k tokens and 32 heads.
    q = q.view(q_len, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [K, group, Lq, D]
    k = k.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)  # [K, group, Lk, D], no copy
    v = v.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    mask = None
    if 1 < q_len < k_len:  # SDPA's own causal mask is aligned to the top left
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    is_causal = 1 < q_len == k_len
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(q_len, num_heads, head_dim)


BACKENDS: dict[str, type[TorchAttentionBackend]] = {
    "flash-attn": FlashAttention2Backend,
    "triton": SplitDecodeBackend,
    "torch": TorchAttentionBackend,
}


def make_backend(name: str) -> AttentionBackend:
    """The backend of this name, as the setting `attention_backend` has it."""
    return BACKENDS[name]()


class Attention(nn.Module):
    """Attention of a layer over a mixed step: decode rows first, then prefill chunks.

    Heads are this rank's own. Softmax scores are scaled by head_dim ** -0.5.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, backend: AttentionBackend
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.backend = backend

    def forward(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        rope: QKNormRope | None = None,
    ) -> Tensor:
        """Attend from qkv [N, (H + 2K) * D]: [N, H * D].

        With `rope` qkv is raw: norms, rotation and the store into the cache are done here. Without
        it they have been done.
        """
        if batch.prefill is not None or batch.num_decode > self.backend.max_rope_rows:
            self._store(qkv, k_cache, v_cache, batch, rope)
            rope = None
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)  # [N, H + 2K, D]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        out = None
        if batch.prefill is not None:
            out = self.backend.prefill(q, k, v, k_cache, v_cache, batch.prefill, self.scale)
        if batch.num_decode:
            q = q[: batch.num_decode]
            out = self.backend.decode(q, k_cache, v_cache, batch, self.scale, rope, out)
        assert out is not None
        return out.flatten(1)  # [N, H * D]

    def _store(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        rope: QKNormRope | None,
    ) -> None:
        """Norm and rotate qkv in place, and put its keys and values into the cache."""
        if rope is not None:
            qk_norm_rope_store(
                qkv,
                rope.q_weight,
                rope.k_weight,
                rope.eps,
                rope.positions,
                rope.cos_sin,
                k_cache,
                v_cache,
                batch.slot_mapping,
                self.num_heads,
                self.num_kv_heads,
            )
