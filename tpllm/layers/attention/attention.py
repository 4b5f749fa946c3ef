"""Causal attention over a paged KV cache, behind one small interface with several backends.

N tokens, P prefill sequences, S decode sequences, B blocks per sequence, H query heads, K key/value
heads, D head_dim. The tokens of a step, or of one of its micro-batches, are ordered: first one
token for each decode sequence, then the prefill chunks one after the other. The keys and values of
all these tokens, and of the micro-batch before, are in the cache before attention runs.

Caches are [num_blocks, block_size, K, D]. A block table lists a sequence's blocks in order; token t
of the sequence lies in block `table[t // block_size]`. Table entries past the sequence's blocks are
never used; they are -1, or blocks of the row's last owner.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpllm.layers.attention.paged_decode import PagedDecode
from tpllm.layers.rotary import QKNormRope, qk_norm_rope_store

# Tokens that plain torch gathers at once for decode rows, to bound the copy's memory.
_GATHERED_TOKENS = 1 << 17
# Largest mask of plain torch's prefill, in elements; with SDPA's copies each takes 6 bytes.
_MASK_ELEMENTS = 1 << 25


KVCache = tuple[Tensor, Tensor]  # keys and values of a layer, each [num_blocks, block_size, K, D]


@dataclass
class PrefillBatch:
    """The prefill chunks of a step, packed one after the other.

    A sequence without new tokens is padding.

    Attributes:
        cu_seqlens_q: [P + 1] int32, where each sequence's new tokens begin among the step's tokens,
            and where the last one's end; the first entry is the number of decode rows
        cu_seqlens_k: [P + 1] int32, running sum of the context lengths, new tokens included
        max_seqlen_q: upper bound of a sequence's new tokens
        max_seqlen_k: upper bound of a context length, in tokens
        block_tables: [P, B] int32
        has_context: True if the new tokens of some sequence may follow tokens already in the cache
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_tables: Tensor
    has_context: bool


@dataclass
class AttentionBatch:
    """The inputs of attention that depend on the step.

    Attributes:
        slot_mapping: [N] int32, the cache slot of each token's key and value
        num_decode: S; each of the first S tokens is a decode row
        context_lens: [S] int32, tokens that each decode row may see, itself included; 0 if the row
            is padding
        block_tables: [S, B] int32
        split_schedule: [num_splits, SPLIT_WORDS] int32, the KV splits of these contexts, made by
            `ContextSplit.schedule`
        prefill: the remaining tokens, or None if there are none
    """

    slot_mapping: Tensor
    num_decode: int
    context_lens: Tensor
    block_tables: Tensor
    split_schedule: Tensor
    prefill: PrefillBatch | None


class AttentionBackend:
    """Attention in plain torch on gathered pages: the reference, and the CPU implementation.

    Other backends replace its methods.

    Attributes:
        name: name for people
        capturable: True if `decode` may be captured in a CUDA graph
        prefill_capturable: True if `prefill` may be captured in a CUDA graph
        max_rope_rows: up to this many rows, `decode` with `rope` is faster than a separate kernel
    """

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
        """Attend with one query per sequence to its cached context.

        Args:
            q: [S, H, D]. With `rope`, a view of raw queries | keys | values, [S, (H + 2K) * D]:
                they are normed and rotated here, and the new keys and values are stored
            out: [S or more, H, D], receives the rows that are not padding; None for a new tensor

        Returns:
            [S, H, D], or `out`.
        """
        assert rope is None
        num_kv_heads, head_dim = k_cache.shape[2:]
        num_blocks = -(-int(batch.context_lens.max()) // k_cache.shape[1])
        num_slots = num_blocks * k_cache.shape[1]
        tables = batch.block_tables[:, :num_blocks].clamp(min=0)  # padding is masked below
        seen = torch.arange(num_slots, device=q.device) < batch.context_lens.unsqueeze(1)
        # the query heads of one key/value head become its queries: [S, K, H / K, D]
        grouped = q.reshape(q.shape[0], num_kv_heads, -1, head_dim)
        attended = torch.empty_like(grouped)
        rows_at_once = max(1, _GATHERED_TOKENS // max(1, num_slots))  # 0: all rows are padding
        for first in range(0, q.shape[0], rows_at_once):
            rows = slice(first, first + rows_at_once)
            unseen = ~seen[rows, :, None, None]  # [s, num_slots, 1, 1]
            # zeroed, not only masked: a weight of 0 times NaN is NaN
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
        """Attend with chunks of queries, each causal within its sequence.

        Args:
            q: [N, H, D], all tokens of the step
            k, v: [N, K, D], all tokens of the step; they are in the cache, too

        Returns:
            [N, H, D]; the rows of tokens in no chunk are undefined.
        """
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


class SplitDecodeBackend(PagedDecode, AttentionBackend):
    """Decode by our split-KV kernel in any dtype, and prefill by torch. It needs no flash-attn."""

    name = "split decode, torch prefill"
    capturable = True
    # At 8 rows one kernel takes 13.7 us and two take 15.4. At 32 rows there is no gain, and in
    # larger batches every KV split computes the norms again.
    max_rope_rows = 16


class FlashAttention2Backend(SplitDecodeBackend):
    """Decode by our split-KV kernel and prefill by flash-attn 2, in fp16 and bf16.

    The flash-attn package is imported when a backend is created.

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
        # Without context, the new tokens are all keys and values: no paging.
        block_table, cu_seqlens_k = None, batch.cu_seqlens_q
        if batch.has_context:
            k, v, block_table, cu_seqlens_k = (
                k_cache,
                v_cache,
                batch.block_tables,
                batch.cu_seqlens_k,
            )
        # With max_seqlen_q=1, flash-attn assumes that q has P rows; ours has the decode rows, too.
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
    """Return the first `context_len` tokens of a sequence, [context_len, K, D].

    `block_table` is [B].
    """
    num_blocks = -(-context_len // cache.shape[1])
    return cache[block_table[:num_blocks]].flatten(0, 1)[:context_len]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend with q [Lq, H, D], the newest of the Lk tokens of k and v [Lk, K, D] of one sequence.

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
    # SDPA's batch is the key/value heads, and its heads are their query heads. With `enable_gqa`,
    # fp32 on a GPU makes the [H, Lq, Lk] matrix of scores: 34 GB for 16k tokens and 32 heads.
    q = q.view(q_len, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [K, group, Lq, D]
    k = k.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)  # [K, group, Lk, D], no copy
    v = v.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    mask = None
    if 1 < q_len < k_len:  # SDPA's own causal mask would be aligned to the top left
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    is_causal = 1 < q_len == k_len
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(q_len, num_heads, head_dim)


BACKENDS: dict[str, type[AttentionBackend]] = {
    "flash-attn": FlashAttention2Backend,
    "triton": SplitDecodeBackend,
    "torch": AttentionBackend,
}


def make_backend(name: str) -> AttentionBackend:
    """Return a new backend by its name, a value of the setting `attention_backend`."""
    return BACKENDS[name]()


class Attention(nn.Module):
    """Attention of one layer over a mixed step: decode rows first, then prefill chunks.

    The head counts are this rank's own. Softmax scores are scaled by head_dim ** -0.5.
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
        """Attend with qkv [N, (H + 2K) * D] and return [N, H * D].

        With `rope`, qkv is raw: this norms and rotates it, and stores its keys and values in the
        cache. Without `rope`, the caller has done so.
        """
        if batch.prefill is not None or batch.num_decode > self.backend.max_rope_rows:
            if rope is not None:
                qk_norm_rope_store(qkv, rope, k_cache, v_cache, batch.slot_mapping)
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
