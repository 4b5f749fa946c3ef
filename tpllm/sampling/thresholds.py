"""Exact thresholds of top-k, top-p and min-p, found in a few passes over a row.

S rows, V vocab_size. A row is stored as `num_shards` shards of Vl columns, one shard of each rank.

Top-k, top-p and min-p each keep the first tokens in the order by logit (ties by id), and the
temperature does not change this order. So each of them is a threshold, the smallest key that is
kept (see `token_order`), and the largest of the three thresholds decides. The threshold is the
largest key for which the sum over all tokens with this key or a larger one reaches a wanted value.
Top-k sums the number of tokens, top-p their probabilities as whole numbers.

One program finds the threshold of a row. A pass computes this sum for eight points. The first
points lie at growing distances below the largest logit. Later points divide the interval that
contains the threshold, evenly by logit and by key in turn. When the interval holds at most
`_CAPACITY` tokens, they are gathered, and a bisection of their keys finds the threshold. Logits of
a trained model take three passes; flat logits, such as random weights give, take more.

Sources: Fan et al. (2018), https://arxiv.org/abs/1805.04833 (top-k); Holtzman et al. (2020),
https://arxiv.org/abs/1904.09751 (top-p); Nguyen et al. (2024), https://arxiv.org/abs/2407.01082
(min-p)

Roofline: a pass reads 4 * V bytes per row, 36 us for 256 rows of Qwen3 at an H200's memory speed.
Eight 64-bit comparisons per token take longer, so a pass is bound by arithmetic.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.sampling.token_order import (
    ID_BITS,
    LARGEST,
    LOWEST_KEY,
    keys_in_kernel,
    keys_of,
    sortable,
    weights_in_kernel,
    weights_of,
)

# constants for kernels, which can read only globals of this type
_ID_BITS, _LAST_ID = tl.constexpr(ID_BITS), tl.constexpr(2**ID_BITS - 1)
_LARGEST = tl.constexpr(LARGEST)
_POINTS = tl.constexpr(8)

_TILE = 1024  # tokens of a row at a time
_CAPACITY = 2048  # tokens that are gathered for the bisection
_GATHER_TILE = 4096


@dataclass
class Truncation:
    """Top-k, top-p and min-p of S rows; tensors on the device, contiguous.

    An attribute is None if no row sets it.

    Attributes:
        temperatures: [S] fp32
        top_ks: [S] int32, 0 for all tokens
        top_ps: [S] fp32, 1 for all
        min_ps: [S] fp32, 0 for all
    """

    temperatures: Tensor
    top_ks: Tensor | None
    top_ps: Tensor | None
    min_ps: Tensor | None

    def __post_init__(self) -> None:
        assert all(each is None or each.is_contiguous() for each in vars(self).values())


def find_thresholds_reference(scores: Tensor, truncation: Truncation) -> Tensor:
    """Plain torch version of `find_thresholds_triton`: sorts each row."""
    num_rows = scores.shape[0]
    scores = scores.flatten(1)  # [S, V]
    ids = torch.arange(scores.shape[1], device=scores.device)
    keys, order = keys_of(scores, ids).sort(dim=1, descending=True)
    temperatures = truncation.temperatures
    temperatures = torch.where(temperatures > 0, temperatures, 1.0)
    largest = scores.amax(dim=1)
    threshold = torch.full((num_rows,), LOWEST_KEY, dtype=torch.int64, device=scores.device)
    if truncation.min_ps is not None:
        bound = sortable(largest + temperatures * truncation.min_ps.log())
        threshold = torch.where(truncation.min_ps > 0, bound << ID_BITS, threshold)
    if truncation.top_ks is not None:
        wanted = truncation.top_ks.long().clamp(0, keys.shape[1])
        kth = keys.gather(1, (wanted - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        threshold = torch.where(wanted > 0, torch.maximum(threshold, kth), threshold)
    if truncation.top_ps is not None:
        weights = weights_of(scores, largest, temperatures).gather(1, order)
        sums = weights.masked_fill(keys < threshold.unsqueeze(1), 0).cumsum(dim=1)
        wanted = (truncation.top_ps.double() * sums[:, -1]).ceil().long().clamp(min=1)
        last = (sums < wanted.unsqueeze(1)).sum(dim=1).clamp(max=keys.shape[1] - 1)
        found = keys.gather(1, last.unsqueeze(1)).squeeze(1)
        threshold = torch.where(truncation.top_ps < 1, torch.maximum(threshold, found), threshold)
    return threshold


# Below, `row` is a row of the scores: its address, the stride of its shards, their number and size.


@triton.jit
def _load_tile(
    row: tl.tuple, shard: tl.tensor, first: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return scores and ids of a tile of a row, and the mask of valid ones: [TILE] each."""
    row_ptr, shard_stride, _, shard_size = row
    cols = first + tl.arange(0, TILE)
    mask = cols < shard_size
    scores = tl.load(row_ptr + shard * shard_stride + cols, mask=mask, other=-float("inf"))
    return scores, shard * shard_size + cols, mask


@triton.jit
def _score_of(key: tl.tensor) -> tl.tensor:
    """Return the score in a key."""
    bits = (key >> _ID_BITS).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sums_from(
    row: tl.tuple,
    points: tl.tensor,  # [_POINTS] int64
    largest: tl.tensor,
    temperature: tl.tensor,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the number of tokens at or above each point, and their weight: [_POINTS] int64."""
    _, _, num_shards, shard_size = row
    counts = tl.zeros([_POINTS, TILE], dtype=tl.int32)
    sums = tl.zeros([_POINTS, TILE], dtype=tl.int64)
    for shard in tl.range(0, num_shards):
        for first in tl.range(0, shard_size, TILE, num_stages=4):
            scores, ids, mask = _load_tile(row, shard, first, TILE)
            keys = keys_in_kernel(scores, ids)
            hit = (keys[None, :] >= points[:, None]) & mask[None, :]
            counts += hit.to(tl.int32)
            if WEIGHTED:
                weights = weights_in_kernel(scores, largest, temperature)
                sums += tl.where(hit, weights[None, :], 0)
    num_tokens = tl.sum(counts, axis=1).to(tl.int64)
    total = num_tokens
    if WEIGHTED:
        total = tl.sum(sums, axis=1)
    return num_tokens, total


@triton.jit
def _between(low: tl.tensor, high: tl.tensor, by_logit: tl.tensor) -> tl.tensor:
    """Return points between two keys, evenly spaced by logit if `by_logit`, else by key."""
    share = tl.arange(0, _POINTS) + 1
    weight = share.to(tl.float32) / (_POINTS + 1)
    low_score = tl.minimum(tl.maximum(_score_of(low), -_LARGEST), _LARGEST)
    high_score = tl.minimum(tl.maximum(_score_of(high - 1), -_LARGEST), _LARGEST)
    scores = low_score * (1.0 - weight) + high_score * weight
    by_score = keys_in_kernel(scores, _LAST_ID)  # the last id of this logit
    by_key = low + (high - low) // (_POINTS + 1) * share
    # By key if the interval is too narrow, or if rounding puts a point outside of it.
    usable = by_logit & ((high - low) >> _ID_BITS > 4096) & (by_score > low) & (by_score < high)
    return tl.where(usable, by_score, by_key)


@triton.jit
def _threshold_of(
    row: tl.tuple,
    gathered_ptr: tl.tensor,  # [CAPACITY] int64
    counter_ptr: tl.tensor,  # int32, zero
    floor: tl.tensor,  # tokens with smaller keys do not count
    wanted: tl.tensor,  # a number of tokens; if WEIGHTED a share of the total weight, in (0, 1)
    largest: tl.tensor,
    temperature: tl.tensor,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> tl.tensor:
    """Return the largest key at which the sum reaches `wanted`; `floor` if none does."""
    point = tl.arange(0, _POINTS)
    distances = tl.exp2(point.to(tl.float32) - 2.0)  # 1/4 to 16; the last one is not used
    if WEIGHTED:
        distances *= temperature
    points = keys_in_kernel(largest - distances, _LAST_ID)
    points = tl.maximum(tl.where(point == _POINTS - 1, floor, points), floor)
    low = floor
    high = tl.maximum(keys_in_kernel(largest, 0), floor) + 1  # above every key
    # Tokens at or above `low` and `high`, and the sum over those at or above `high`.
    num_low, num_high, beyond = tl.zeros_like(low), tl.zeros_like(low), tl.zeros_like(low)
    is_first, by_logit = True, False
    while is_first | (num_low - num_high > CAPACITY):
        counts, sums = _sums_from(row, points, largest, temperature, WEIGHTED, TILE)
        if is_first:
            num_low = tl.max(counts, axis=0)  # at or above `floor`
        if WEIGHTED:
            if is_first:
                whole = tl.max(sums, axis=0).to(tl.float64)  # at or above `floor`
                wanted = tl.maximum(tl.ceil(wanted * whole), 1.0)
            reached = sums >= wanted.to(tl.int64)
        else:
            reached = sums >= wanted
        low = tl.maximum(low, tl.max(tl.where(reached, points, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, points), axis=0))
        high = tl.maximum(high, low + 1)  # `floor` may fail too, if all weights are 0
        num_low = tl.minimum(num_low, tl.min(tl.where(reached, counts, num_low), axis=0))
        num_high = tl.maximum(num_high, tl.max(tl.where(reached, num_high, counts), axis=0))
        beyond = tl.maximum(beyond, tl.max(tl.where(reached, beyond, sums), axis=0))
        # Even spacing by logit fits the distribution of tokens. Every other pass spaces points by
        # key, which ends early if many logits tie: near zero, spacing by logit hardly converges.
        by_logit = not by_logit
        points = _between(low, high, by_logit)
        is_first = False
    # Gather the tokens from `low` to `high`; their order does not matter.
    _, _, num_shards, shard_size = row
    counter_ptrs = counter_ptr + tl.zeros([TILE], dtype=tl.int32)
    for shard in tl.range(0, num_shards):
        for first in tl.range(0, shard_size, TILE, num_stages=4):
            scores, ids, mask = _load_tile(row, shard, first, TILE)
            keys = keys_in_kernel(scores, ids)
            hit = (keys >= low) & (keys < high) & mask
            place = tl.atomic_add(counter_ptrs, 1, mask=hit, sem="relaxed")
            tl.store(gathered_ptr + place, keys, mask=hit)
    tl.debug_barrier()  # all threads have stored before any thread loads
    place = tl.arange(0, CAPACITY)
    present = place < num_low - num_high
    keys = tl.load(gathered_ptr + place, mask=present, other=0)
    if WEIGHTED:
        weights = weights_in_kernel(_score_of(keys), largest, temperature)
    else:
        weights = tl.full([CAPACITY], 1, dtype=tl.int64)
    weights = tl.where(present, weights, 0)
    tl.debug_barrier()  # all threads have loaded before the buffer is reused
    while high - low > 1:
        middle = low + (high - low) // 2
        total = beyond + tl.sum(tl.where(keys >= middle, weights, 0), axis=0)
        if total >= wanted.to(tl.int64):
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _find_thresholds_kernel(
    scores_ptr: tl.tensor,  # [S, shards, Vl] fp32
    temperatures_ptr: tl.tensor,  # [S]
    top_ks_ptr: tl.tensor,  # [S]
    top_ps_ptr: tl.tensor,  # [S]
    log_min_ps_ptr: tl.tensor,  # [S]
    gathered_ptr: tl.tensor,  # [S, CAPACITY] int64
    counters_ptr: tl.tensor,  # [S, 2] int32, zero
    thresholds_ptr: tl.tensor,  # [S] int64
    row_stride: tl.tensor,
    shard_stride: tl.tensor,
    num_shards: tl.tensor,
    shard_size: tl.tensor,  # Vl
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64)
    row = (scores_ptr + index * row_stride, shard_stride, num_shards, shard_size)
    gathered_ptr += index * CAPACITY
    temperature = tl.load(temperatures_ptr + index)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    highest = tl.full([TILE], -float("inf"), dtype=tl.float32)
    for shard in tl.range(0, num_shards):
        for first in tl.range(0, shard_size, TILE, num_stages=4):
            scores, _, _ = _load_tile(row, shard, first, TILE)
            highest = tl.maximum(highest, scores)
    largest = tl.max(highest, axis=0)
    none = tl.full([], -float("inf"), dtype=tl.float32)
    lowest = keys_in_kernel(none, _LAST_ID)  # at or below every token's key
    threshold = lowest
    if HAS_MIN_P:
        log_min_p = tl.load(log_min_ps_ptr + index)
        if log_min_p > -float("inf"):
            threshold = keys_in_kernel(largest + temperature * log_min_p, _LAST_ID)
    if HAS_TOP_K:
        top_k = tl.load(top_ks_ptr + index)
        if top_k > 0:
            found = _threshold_of(
                row,
                gathered_ptr,
                counters_ptr + index * 2,
                lowest,
                tl.minimum(top_k, num_shards * shard_size).to(tl.int64),
                largest,
                temperature,
                WEIGHTED=False,
                TILE=TILE,
                CAPACITY=CAPACITY,
            )
            threshold = tl.maximum(threshold, found)
    if HAS_TOP_P:
        top_p = tl.load(top_ps_ptr + index)
        if top_p < 1:
            found = _threshold_of(
                row,
                gathered_ptr,
                counters_ptr + index * 2 + 1,
                threshold,
                top_p.to(tl.float64),
                largest,
                temperature,
                WEIGHTED=True,
                TILE=TILE,
                CAPACITY=CAPACITY,
            )
            threshold = tl.maximum(threshold, found)
    tl.store(thresholds_ptr + index, threshold)


def find_thresholds_triton(scores: Tensor, truncation: Truncation) -> Tensor:
    """Return the smallest key of each row that is kept: [S] int64.

    Args:
        scores: [S, shards, Vl] float32, no NaN, last dimension contiguous; column c of shard s is
            token s * Vl + c
    """
    num_rows, num_shards, shard_size = scores.shape
    gathered = torch.empty(num_rows, _CAPACITY, dtype=torch.int64, device=scores.device)
    counters = torch.zeros(num_rows, 2, dtype=torch.int32, device=scores.device)
    thresholds = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    min_ps, top_ks, top_ps = truncation.min_ps, truncation.top_ks, truncation.top_ps
    _find_thresholds_kernel[(num_rows,)](
        scores,
        truncation.temperatures,
        counters if top_ks is None else top_ks,
        scores if top_ps is None else top_ps,
        scores if min_ps is None else min_ps.log(),
        gathered,
        counters,
        thresholds,
        scores.stride(0),
        scores.stride(1),
        num_shards,
        shard_size,
        HAS_TOP_K=top_ks is not None,
        HAS_TOP_P=top_ps is not None,
        HAS_MIN_P=min_ps is not None,
        TILE=_TILE,
        CAPACITY=_CAPACITY,
        num_warps=16,
    )
    return thresholds


def find_thresholds(scores: Tensor, truncation: Truncation) -> Tensor:
    """Run the kernel on a GPU and the reference elsewhere; see `find_thresholds_triton`."""
    return (find_thresholds_triton if scores.is_cuda else find_thresholds_reference)(
        scores, truncation
    )


def likeliest_reference(scores: Tensor, num_tokens: int, vocab_start: int) -> Tensor:
    """Plain torch version of `likeliest`."""
    ids = torch.arange(vocab_start, vocab_start + scores.shape[1], device=scores.device)
    return keys_of(scores, ids).topk(num_tokens, dim=1).values


@triton.jit
def _gather_from_kernel(
    scores_ptr: tl.tensor,  # [S, Vl] fp32
    thresholds_ptr: tl.tensor,  # [S] int64, keys with local ids
    counters_ptr: tl.tensor,  # [S] int32, zero
    keys_ptr: tl.tensor,  # [S, num_tokens] int64
    scores_stride: tl.tensor,
    local_size: tl.tensor,
    num_tokens: tl.tensor,
    vocab_start: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = cols < local_size
    scores = tl.load(scores_ptr + row * scores_stride + cols, mask=mask, other=-float("inf"))
    keys = keys_in_kernel(scores, cols)
    hit = (keys >= tl.load(thresholds_ptr + row)) & mask
    counter_ptrs = counters_ptr + row + tl.zeros([TILE], dtype=tl.int32)
    place = tl.atomic_add(counter_ptrs, 1, mask=hit, sem="relaxed")
    tl.store(keys_ptr + row * num_tokens + place, keys - vocab_start, mask=hit)


def likeliest_triton(scores: Tensor, num_tokens: int, vocab_start: int) -> Tensor:
    """Launch the kernels; see `likeliest`."""
    num_rows, local_size = scores.shape
    counters = torch.zeros(num_rows, dtype=torch.int32, device=scores.device)
    wanted = torch.full_like(counters, num_tokens)
    truncation = Truncation(torch.ones_like(scores[:, 0]), wanted, None, None)
    thresholds = find_thresholds_triton(scores.unsqueeze(1), truncation)
    keys = torch.empty(num_rows, num_tokens, dtype=torch.int64, device=scores.device)
    _gather_from_kernel[(num_rows, triton.cdiv(local_size, _GATHER_TILE))](
        scores,
        thresholds,
        counters,
        keys,
        scores.stride(0),
        local_size,
        num_tokens,
        vocab_start,
        TILE=_GATHER_TILE,
    )
    return keys.sort(dim=1, descending=True).values


def likeliest(scores: Tensor, num_tokens: int, vocab_start: int) -> Tensor:
    """Return the keys of each row's likeliest tokens on this rank, in order: [S, num_tokens] int64.

    Args:
        scores: [S, Vl] float32, no NaN, last dimension contiguous
        num_tokens: at least 1, at most Vl
    """
    gather = likeliest_triton if scores.is_cuda else likeliest_reference
    return gather(scores, num_tokens, vocab_start)
