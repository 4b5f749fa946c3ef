"""Top-k, top-p and min-p over a vocabulary that is split over the ranks.

S sequences, V vocab_size, Vl ids on this rank.

All three keep the beginning of one order, that of the tokens by logit (ties by id), and the
temperature does not change that order. So each comes down to a cut, the smallest key that stays
(see `token_order`), and the cuts to the largest of them. A cut is found digit by digit: every rank
sums its tokens above 15 points, the sums are added over the ranks, and the interval that holds the
cut shrinks sixteenfold. The sums are whole numbers, so the result is exact, and the same on any
number of ranks.

Sources: Fan et al. (2018), https://arxiv.org/abs/1805.04833 (top-k); Holtzman et al. (2020),
https://arxiv.org/abs/1904.09751 (top-p); Nguyen et al. (2024), https://arxiv.org/abs/2407.01082
(min-p)
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.layers.token_order import (
    ID_BITS,
    KEY_BITS,
    LOWEST_KEY,
    Sums,
    keys_in_kernel,
    keys_of,
    max_over_ranks,
    sortable,
    token_sums,
)
from tpllm.parallel.collectives import all_reduce
from tpllm.parallel.group import TPGroup

_DIGIT_BITS = 4
_TILE = 2048


@dataclass
class Truncation:
    """How many of the likeliest tokens each of S rows may draw from; on the device.

    A member is None where no row asks for it, which saves its passes over the vocabulary.

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


def cuts(
    scores: Tensor, truncation: Truncation, vocab_start: int, vocab_size: int, tp: TPGroup
) -> Tensor:
    """The smallest key of each row that stays, the same on every rank: [S] int64.

    Args:
        scores: [S, Vl] float32, as `scores_of` gives them
    """

    temperatures = torch.where(truncation.temperatures > 0, truncation.temperatures, 1.0)
    cut = torch.full(scores.shape[:1], LOWEST_KEY, dtype=torch.int64, device=scores.device)
    if truncation.min_ps is not None or truncation.top_ps is not None:
        largest = max_over_ranks(scores.amax(dim=1), tp)
    if truncation.min_ps is not None:
        bound = sortable(largest + temperatures * truncation.min_ps.log())
        cut = torch.where(truncation.min_ps > 0, bound << ID_BITS, cut)
    if truncation.top_ks is not None:
        wanted = truncation.top_ks.long().clamp(max=vocab_size)
        found = _largest_key(token_sums(scores, vocab_start), wanted, tp)
        cut = torch.where(wanted > 0, torch.maximum(cut, found), cut)
    if truncation.top_ps is not None:
        weights = token_sums(scores, vocab_start, (largest, temperatures))
        kept = cut.unsqueeze(1)
        whole = all_reduce(weights(kept), tp).squeeze(1)
        cuts_here = truncation.top_ps < 1
        wanted = (truncation.top_ps.double() * whole).ceil().long().clamp(min=1)
        wanted = torch.where(cuts_here, wanted, 0)
        found = _largest_key(
            lambda points, needed: weights(torch.maximum(points, kept), needed), wanted, tp
        )
        cut = torch.where(cuts_here, torch.maximum(cut, found), cut)
    return cut


def _largest_key(sums: Sums, wanted: Tensor, tp: TPGroup) -> Tensor:
    """The largest key from which on the sum over all ranks still reaches `wanted` [S]: [S] int64.

    It means nothing for rows that want 0.
    """
    low = torch.full_like(wanted, LOWEST_KEY)
    digits = torch.arange(1, 2**_DIGIT_BITS, device=wanted.device)
    for shift in range(KEY_BITS - _DIGIT_BITS, -1, -_DIGIT_BITS):
        points = low.unsqueeze(1) + (digits << shift)  # [S, 15]
        reached = all_reduce(sums(points, wanted), tp) >= wanted.unsqueeze(1)
        low = low + (reached.sum(dim=1) << shift)
    return low


def drop_below_reference(scores: Tensor, cut: Tensor, vocab_start: int) -> None:
    """Torch version of `drop_below_triton`."""
    ids = torch.arange(vocab_start, vocab_start + scores.shape[1], device=scores.device)
    scores.masked_fill_(keys_of(scores, ids) < cut.unsqueeze(1), -torch.inf)


@triton.jit
def _drop_below_kernel(
    scores_ptr: tl.tensor,  # [S, Vl]
    cut_ptr: tl.tensor,  # [S] int64
    scores_stride: tl.tensor,
    local_size: tl.tensor,
    vocab_start: tl.tensor,
    ID_BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = cols < local_size
    score_ptrs = scores_ptr + row.to(tl.int64) * scores_stride + cols
    keys = keys_in_kernel(tl.load(score_ptrs, mask=mask, other=0.0), vocab_start + cols, ID_BITS)
    below = keys < tl.load(cut_ptr + row)
    tl.store(score_ptrs, tl.full([TILE], -float("inf"), tl.float32), mask=mask & below)


def drop_below_triton(scores: Tensor, cut: Tensor, vocab_start: int) -> None:
    """Set scores [S, Vl] whose keys are below cut [S] to -inf, in place."""
    num_rows, local_size = scores.shape
    _drop_below_kernel[(num_rows, triton.cdiv(local_size, _TILE))](
        scores,
        cut,
        scores.stride(0),
        local_size,
        vocab_start,
        ID_BITS=ID_BITS,
        TILE=_TILE,
    )


def truncate(
    scores: Tensor, truncation: Truncation, vocab_start: int, vocab_size: int, tp: TPGroup
) -> None:
    """Set the scores of tokens that cannot be drawn to -inf, in place.

    In vLLM's order: min-p and top-k of all tokens, then top-p of what these leave.
    """
    cut = cuts(scores, truncation, vocab_start, vocab_size, tp)
    (drop_below_triton if scores.is_cuda else drop_below_reference)(scores, cut, vocab_start)
