"""Decode attention over a paged cache, with KV splits: any batch size, dtype and page size.

S sequences, H query heads, K key/value heads, G = H / K, D head_dim, B blocks per sequence, P KV
splits.

One program computes one key/value head for one KV split, an interval of one sequence's context. The
step's split schedule lists the splits (`tpllm.layers.attention.split_schedule`). It has a fixed
size, so a captured CUDA graph is replayed with other schedules. The last program of a head to
finish combines the splits (sums weighted by the exponentials of their maxima), so there is no
second kernel.

Source: split-KV decoding, Dao et al. (2023), https://crfm.stanford.edu/2023/10/12/flashdecoding.html

Roofline: keys and values are read once, 2 * context * K * D elements a sequence, at memory speed.
At batch 1 the time is a launch and three dependent reads, about 6 us. `docs/benchmark-log.md` has
the measured bandwidths.
"""

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.layers.attention import split_schedule as schedule
from tpllm.layers.attention.split_schedule import NUM_SCRATCH_ENTRIES, ContextSplit
from tpllm.layers.dependent_launch import dependent_launch
from tpllm.layers.rotary import QKNormRope

if TYPE_CHECKING:  # its module imports this one
    from tpllm.layers.attention.attention import AttentionBatch

_SPLIT_WORDS = tl.constexpr(schedule.SPLIT_WORDS)
_SEQ, _CONTEXT_LEN = tl.constexpr(schedule.SEQ), tl.constexpr(schedule.CONTEXT_LEN)
_BEGIN, _END = tl.constexpr(schedule.BEGIN), tl.constexpr(schedule.END)
_INDEX, _COUNT = tl.constexpr(schedule.INDEX), tl.constexpr(schedule.COUNT)
_SCRATCH = tl.constexpr(schedule.SCRATCH)
# Keys that a program reads at a time, and its warps: see `ContextSplit.has_large_programs`.
_LARGE_SHAPE = {"BLOCK_N": 64, "num_warps": 4}
_SMALL_SHAPE = {"BLOCK_N": 32, "num_warps": 2}
# Two tiles are in flight if a page is at least as large as a tile. With three in flight, fewer
# programs would fit on a multiprocessor.
_MAX_STAGES = 3


@triton.jit
def _norm_and_rotate(
    row_ptrs: tl.tensor,  # [R, 1]
    weight_ptr: tl.tensor,  # [D]
    rotation_ptr: tl.tensor,  # [D]: cosines | sines
    dims: tl.tensor,  # [D]
    mask: tl.tensor,  # [R, D]
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Norm, scale and rotate heads as `qk_norm_rope_store` does: [R, D] fp32."""
    other = (dims + D // 2) % D  # the other element of each pair
    in_head = dims < D
    x = tl.load(row_ptrs + dims, mask=mask, other=0.0).to(tl.float32)
    pair = tl.load(row_ptrs + other, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        weight = tl.load(weight_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
        pair_weight = tl.load(weight_ptr + other, mask=in_head, other=0.0).to(tl.float32)
        x = x * scale * weight[None, :]
        pair = pair * scale * pair_weight[None, :]
    cos = tl.load(rotation_ptr + dims % (D // 2), mask=in_head, other=0.0)
    sin = tl.load(rotation_ptr + D // 2 + dims % (D // 2), mask=in_head, other=0.0)
    sin = tl.where(dims < D // 2, -sin, sin)
    return x * cos[None, :] + pair * sin


@triton.jit
def _load_evict_last(ptr: tl.tensor) -> tl.tensor:
    return tl.load(ptr, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["max_blocks"])
def _paged_decode_kernel(
    q_ptr: tl.tensor,  # [S, H, D]
    k_cache_ptr: tl.tensor,  # [num_blocks, block_size, K, D]
    v_cache_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,  # [S, B]
    split_schedule_ptr: tl.tensor,  # [P, SPLIT_WORDS]
    out_ptr: tl.tensor,  # [S, H, D]
    scratch_ptr: tl.tensor,  # [entries, K, G, D + 2] fp32: sum of values, maximum, normaliser
    counters_ptr: tl.tensor,  # [entries, K] int32, zero before and after
    q_stride: tl.tensor,
    max_blocks: tl.tensor,
    block_size: tl.tensor,
    scale: tl.tensor,  # softmax scale times log2(e)
    cos_sin_ptr: tl.tensor,  # [L, D], only if ROPE
    q_norm_ptr: tl.tensor,  # [D]; this and the next two only if HAS_NORM
    k_norm_ptr: tl.tensor,  # [D]
    eps: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,  # BLOCK_N divides block_size, so a tile lies in one page
    ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,  # only with ROPE
    PDL: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0)
    # The schedule and the block tables were written before the step's first layer, at least two
    # kernels back, so they can be read before `gdc_wait`. They are kept in the L2 for the next
    # layer while keys and values stream through it.
    split_ptr = split_schedule_ptr + tl.program_id(1) * _SPLIT_WORDS
    begin, end = _load_evict_last(split_ptr + _BEGIN), _load_evict_last(split_ptr + _END)
    seq, context_len = (
        _load_evict_last(split_ptr + _SEQ),
        _load_evict_last(split_ptr + _CONTEXT_LEN),
    )
    index, count = _load_evict_last(split_ptr + _INDEX), _load_evict_last(split_ptr + _COUNT)
    scratch_index = _load_evict_last(split_ptr + _SCRATCH)
    if begin == end:  # no split; other programs wait for this kernel's predecessor
        return

    heads = tl.arange(0, G_PADDED)  # [G]
    dims = tl.arange(0, D_PADDED)  # [D]
    head_mask = (heads < G)[:, None] & (dims < D)[None, :]
    qkv_ptr = q_ptr + seq.to(tl.int64) * q_stride  # keys and values follow where ROPE
    head_ptrs = qkv_ptr + (kv_head * G + heads)[:, None] * D  # [G, 1]
    table_ptr = block_tables_ptr + seq.to(tl.int64) * max_blocks
    page = _load_evict_last(table_ptr + begin // block_size)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if ROPE:
        newest = context_len - 1
        rotation_ptr = cos_sin_ptr + newest.to(tl.int64) * D
        q = _norm_and_rotate(head_ptrs, q_norm_ptr, rotation_ptr, dims, head_mask, eps, HAS_NORM, D)
        q = q.to(q_ptr.dtype.element_ty)
        if end == context_len:  # the newest token is in this program's split
            block = tl.load(table_ptr + newest // block_size).to(tl.int64)
            slot = block * block_size + newest % block_size
            first_row = (heads == 0)[:, None] & (dims < D)[None, :]  # [G, D], as q's tile
            key_ptrs = qkv_ptr + (NUM_KV_HEADS * G + kv_head) * D + heads[:, None] * 0
            key = _norm_and_rotate(
                key_ptrs, k_norm_ptr, rotation_ptr, dims, first_row, eps, HAS_NORM, D
            )
            value_ptrs = key_ptrs + NUM_KV_HEADS * D + dims
            value = tl.load(value_ptrs, mask=first_row, other=0.0)
            cached = (slot * NUM_KV_HEADS + kv_head) * D + dims[None, :] + heads[:, None] * 0
            tl.store(k_cache_ptr + cached, key, mask=first_row)
            tl.store(v_cache_ptr + cached, value, mask=first_row)
            tl.debug_barrier()  # all threads of this program read them below
    else:
        q = tl.load(head_ptrs + dims, mask=head_mask, other=0.0)  # [G, D]

    maximum = tl.full([G_PADDED], -float("inf"), dtype=tl.float32)
    normaliser = tl.zeros([G_PADDED], dtype=tl.float32)
    total = tl.zeros([G_PADDED, D_PADDED], dtype=tl.float32)
    for token in tl.range(begin, end, BLOCK_N):
        tokens = token + tl.arange(0, BLOCK_N)  # [N]
        seen = tokens < end
        if ALIGNED:
            slots = page.to(tl.int64) * block_size + token % block_size + tl.arange(0, BLOCK_N)
            # Load the next tile's page one iteration ahead. Otherwise the loads of keys and values
            # would wait for it, and only one tile would be in flight.
            page = _load_evict_last(table_ptr + tl.minimum(token + BLOCK_N, end - 1) // block_size)
        else:
            blocks = tl.load(table_ptr + tokens // block_size, mask=seen, other=0).to(tl.int64)
            slots = blocks * block_size + tokens % block_size
        offsets = (slots * NUM_KV_HEADS + kv_head)[:, None] * D + dims  # [N, D]
        mask = seen[:, None] & (dims < D)[None, :]
        k = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [G, N]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_maximum[:, None])
        rescale = tl.exp2(maximum - new_maximum)
        normaliser = normaliser * rescale + tl.sum(weights, axis=1)
        total = total * rescale[:, None]
        total += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    out_ptrs = out_ptr + ((seq.to(tl.int64) * NUM_KV_HEADS + kv_head) * G + heads)[:, None] * D
    out_ptrs += dims
    if count == 1:
        tl.store(out_ptrs, total / normaliser[:, None], mask=head_mask)
        return

    rows = heads * (D + 2)  # [G]
    first_ptr = scratch_ptr + (scratch_index * NUM_KV_HEADS + kv_head) * (G * (D + 2))
    split_stride = NUM_KV_HEADS * G * (D + 2)
    own_ptr = first_ptr + index * split_stride
    tl.store(own_ptr + rows[:, None] + dims, total, mask=head_mask)
    tl.store(own_ptr + rows + D, maximum, mask=heads < G)
    tl.store(own_ptr + rows + D + 1, normaliser, mask=heads < G)
    tl.debug_barrier()  # all threads have written their values before the counter is incremented
    counter_ptr = counters_ptr + scratch_index * NUM_KV_HEADS + kv_head
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") < count - 1:
        return
    tl.debug_barrier()
    tl.store(counter_ptr, 0)
    maximum = tl.full([G_PADDED], -float("inf"), dtype=tl.float32)
    normaliser = tl.zeros([G_PADDED], dtype=tl.float32)
    total = tl.zeros([G_PADDED, D_PADDED], dtype=tl.float32)
    for other in tl.range(0, count):  # in a fixed order, so that the bits are reproducible
        other_ptr = first_ptr + other * split_stride
        split_maximum = tl.load(
            other_ptr + rows + D, mask=heads < G, other=0.0, cache_modifier=".cg"
        )
        split_normaliser = tl.load(
            other_ptr + rows + D + 1, mask=heads < G, other=1.0, cache_modifier=".cg"
        )
        split_total = tl.load(
            other_ptr + rows[:, None] + dims, mask=head_mask, other=0.0, cache_modifier=".cg"
        )
        new_maximum = tl.maximum(maximum, split_maximum)
        rescale, weight = tl.exp2(maximum - new_maximum), tl.exp2(split_maximum - new_maximum)
        normaliser = normaliser * rescale + split_normaliser * weight
        total = total * rescale[:, None] + split_total * weight[:, None]
        maximum = new_maximum
    tl.store(out_ptrs, total / normaliser[:, None], mask=head_mask)


class PagedDecode:
    """The decode of an attention backend, with its scratch memory, which all layers share."""

    def __init__(self) -> None:
        self._scratch: tuple[Tensor, Tensor] | None = None

    def decode(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: "AttentionBatch",
        scale: float,
        rope: QKNormRope | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend with one query per sequence.

        Args:
            q: [S, H, D], heads and their elements contiguous. With `rope`, the raw keys and values
                of the newest token follow the queries in each row. Queries and keys are normed (if
                it has norms) and rotated at the last position of the context, and keys and values
                are stored in the cache
            k_cache, v_cache: [num_blocks, block_size, K, D], contiguous
            out: contiguous, S rows or more; rows with a context are written. None for a new tensor

        Returns:
            [S, H, D], or `out`.
        """
        S, H, D = q.shape
        block_size, K = k_cache.shape[1:3]
        assert rope is None or q.stride(0) == (H + 2 * K) * D
        G = H // K
        if out is None:
            out = torch.empty(S, H, D, dtype=q.dtype, device=q.device)
        assert out.is_contiguous()
        if self._scratch is None:
            # Allocated once: CUDA graphs keep using the memory they were captured with.
            counters = torch.zeros(NUM_SCRATCH_ENTRIES, dtype=torch.int32, device=q.device)
            sums = torch.empty(len(counters) * G * (D + 2), dtype=torch.float32, device=q.device)
            self._scratch = (counters, sums)
        counters, scratch = self._scratch
        D_padded = max(16, triton.next_power_of_2(D))
        token_bytes, memory = 2 * D_padded * k_cache.element_size(), _tile_memory(q.device)
        fits = _LARGE_SHAPE["BLOCK_N"] * token_bytes <= memory
        shape = _LARGE_SHAPE if ContextSplit(K).has_large_programs(S) and fits else _SMALL_SHAPE
        _paged_decode_kernel[(K, batch.split_schedule.shape[0])](
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            batch.split_schedule,
            out,
            scratch,
            counters,
            q.stride(0),
            batch.block_tables.stride(0),
            block_size,
            scale * 1.4426950408889634,
            rope.cos_sin if rope else q,
            *((rope and rope.norm_weights) or (q, q)),
            rope.eps if rope else 0.0,
            NUM_KV_HEADS=K,
            G=G,
            G_PADDED=max(16, triton.next_power_of_2(G)),
            D=D,
            D_PADDED=D_padded,
            ALIGNED=block_size % shape["BLOCK_N"] == 0,
            ROPE=rope is not None,
            HAS_NORM=rope is not None and rope.norm_weights is not None,
            num_stages=min(_MAX_STAGES, 1 + memory // (shape["BLOCK_N"] * token_bytes)),
            **shape,
            **(dependent_launch(q.device, S) if rope else {"PDL": False}),
        )
        return out


@cache
def _tile_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that the tiles of a program may take."""
    if device.type != "cuda":
        return 1 << 20
    utils = triton.runtime.driver.active.utils
    return int(utils.get_device_properties(device.index)["max_shared_mem"]) - (16 << 10)
