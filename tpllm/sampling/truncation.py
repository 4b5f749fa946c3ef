"""Top-k, top-p and min-p over a vocabulary that is split over the ranks.

S sequences, Vl ids on this rank.

The ranks divide the rows among them: each rank receives its rows' slices from all ranks, finds
their thresholds (see `thresholds`), and sends them to the other ranks. A row's logits cross the
link once, 600 KB for 150,000 tokens. Without this exchange, every pass over a row would need an
all-reduce.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.parallel.collectives import all_gather, all_to_all
from tpllm.parallel.group import TPGroup
from tpllm.sampling.thresholds import Truncation, find_thresholds
from tpllm.sampling.token_order import keys_in_kernel, keys_of

_TILE = 2048


def thresholds_over_ranks(scores: Tensor, truncation: Truncation, tp: TPGroup) -> Tensor:
    """Return the smallest key of each row that is kept, the same on every rank: [S] int64.

    Args:
        scores: [S, Vl] float32, as `scores_of` returns them
    """
    if tp.size == 1:
        return find_thresholds(scores.unsqueeze(1), truncation)
    S, local_size = scores.shape
    each = -(-S // tp.size)  # rows per rank
    padded = scores.new_empty(each * tp.size, local_size)
    padded[:S], padded[S:] = scores, -torch.inf
    mine = all_to_all(padded.view(tp.size, each, local_size), tp)  # [ranks, rows, Vl]
    rows = torch.arange(each * tp.rank, each * (tp.rank + 1), device=scores.device)
    rows = rows.clamp(max=S - 1)  # padding takes the settings of the last row
    settings: Any = {name: x if x is None else x[rows] for name, x in vars(truncation).items()}
    thresholds = find_thresholds(mine.transpose(0, 1), Truncation(**settings))
    return all_gather(thresholds, tp).flatten()[:S]


def drop_below_reference(scores: Tensor, threshold: Tensor, vocab_start: int) -> None:
    """Plain torch version of `drop_below_triton`."""
    ids = torch.arange(vocab_start, vocab_start + scores.shape[1], device=scores.device)
    scores.masked_fill_(keys_of(scores, ids) < threshold.unsqueeze(1), -torch.inf)


@triton.jit
def _drop_below_kernel(
    scores_ptr: tl.tensor,  # [S, Vl]
    threshold_ptr: tl.tensor,  # [S] int64
    scores_stride: tl.tensor,
    local_size: tl.tensor,
    vocab_start: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = cols < local_size
    score_ptrs = scores_ptr + row.to(tl.int64) * scores_stride + cols
    keys = keys_in_kernel(tl.load(score_ptrs, mask=mask, other=0.0), vocab_start + cols)
    below = keys < tl.load(threshold_ptr + row)
    tl.store(score_ptrs, tl.full([TILE], -float("inf"), tl.float32), mask=mask & below)


def drop_below_triton(scores: Tensor, threshold: Tensor, vocab_start: int) -> None:
    """Set scores [S, Vl] whose keys are below threshold [S] to -inf, in place."""
    num_rows, local_size = scores.shape
    _drop_below_kernel[(num_rows, triton.cdiv(local_size, _TILE))](
        scores, threshold, scores.stride(0), local_size, vocab_start, TILE=_TILE
    )


def drop_below(scores: Tensor, threshold: Tensor, vocab_start: int) -> None:
    """Run the kernel on a GPU and the reference elsewhere; see `drop_below_triton`."""
    (drop_below_triton if scores.is_cuda else drop_below_reference)(scores, threshold, vocab_start)


def truncate(scores: Tensor, truncation: Truncation, vocab_start: int, tp: TPGroup) -> None:
    """Set the scores of tokens that top-k, top-p and min-p exclude to -inf, in place.

    The order is vLLM's: min-p and top-k of all tokens, then top-p of the tokens that remain.
    """
    drop_below(scores, thresholds_over_ranks(scores, truncation, tp), vocab_start)
