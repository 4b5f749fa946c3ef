"""Masks of the tokens that may be sampled: one bit per id, 32 bits per word.

P rows of scores, m of them masked, Vl ids on this rank, w words of a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MASK_BITS = 32  # per word
_TILE = 2048


def keep_masked_reference(scores: Tensor, rows: Tensor, words: Tensor, shift: int) -> None:
    """Plain torch version of `keep_masked_triton`."""
    bits = torch.arange(shift, shift + scores.shape[1], device=scores.device)  # [Vl]
    known = bits < MASK_BITS * words.shape[1]
    of_bits = words[:, bits[known] // MASK_BITS]  # [m, bits that exist]
    allowed = torch.zeros(len(rows), scores.shape[1], dtype=torch.bool, device=scores.device)
    allowed[:, known] = ((of_bits >> (bits[known] % MASK_BITS)) & 1).bool()
    scores[rows] = scores[rows].masked_fill(~allowed, -torch.inf)


@triton.jit
def _keep_masked_kernel(
    scores_ptr: tl.tensor,  # [P, Vl]
    rows_ptr: tl.tensor,  # [m] int64
    words_ptr: tl.tensor,  # [m, w]
    scores_stride: tl.tensor,
    local_size: tl.tensor,  # Vl
    num_words: tl.tensor,  # w
    shift: tl.tensor,
    MASK_BITS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bits = cols + shift
    places = bits // MASK_BITS
    words = tl.load(words_ptr + entry * num_words + places, mask=places < num_words, other=0)
    banned = ((words >> (bits % MASK_BITS)) & 1) == 0
    score_ptrs = scores_ptr + tl.load(rows_ptr + entry) * scores_stride + cols
    no_score = tl.full([TILE], -float("inf"), tl.float32)
    tl.store(score_ptrs, no_score, mask=banned & (cols < local_size))


def keep_masked_triton(scores: Tensor, rows: Tensor, words: Tensor, shift: int) -> None:
    """Set the scores of tokens that a row's mask does not allow to -inf, in place.

    Args:
        scores: [P, Vl] float32, last dimension contiguous
        rows: [m] int64, the rows of scores that have masks
        words: [m, w] int32, contiguous; ids beyond the last bit are not allowed
        shift: index of column 0's bit in the first word
    """
    num_masks, num_words = words.shape
    local_size = scores.shape[1]
    _keep_masked_kernel[(num_masks, triton.cdiv(local_size, _TILE))](
        scores,
        rows,
        words,
        scores.stride(0),
        local_size,
        num_words,
        shift,
        MASK_BITS=MASK_BITS,
        TILE=_TILE,
    )


def keep_masked(scores: Tensor, rows: Tensor, words: Tensor, shift: int) -> None:
    """Run the kernel on a GPU and the reference elsewhere; see `keep_masked_triton`."""
    implementation = keep_masked_triton if scores.is_cuda else keep_masked_reference
    implementation(scores, rows, words, shift)
