"""The order of tokens by logit, with ties by id; ranks in it, and exact sums of probabilities.

S sequences, n positions, V vocab_size, Vl ids on this rank.

A token's position in the order is one number, its key: `(bits of the logit, made to sort as the
logit does) * 2**20 + (2**20 - 1 - id)`. A larger key is likelier, and of equal logits the lower id
comes first. Top-k, top-p and min-p each keep the tokens from some key on: the threshold is the
smallest key that is kept.

Sums are int64, so they do not depend on the order of tokens or on how ranks split them. A token
counts 1, or its probability as a whole multiple of 2**-40 of the likeliest token's. Rounding down
loses 2**-41 per token on average, 7e-8 of the total over 150,000 tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ID_BITS = 20
KEY_BITS = 32 + ID_BITS
LOWEST_KEY = -(2 ** (KEY_BITS - 1))  # at or below every token's key
UNIT = 2.0**40  # the weight of the likeliest token
_LAST_ID = 2**ID_BITS - 1
_SIGN_MASK = 0x7FFFFFFF
LARGEST = torch.finfo(torch.float32).max  # bounds the subtrahend, because inf - inf is NaN
# the same for kernels, which can read only globals of this type
_ID_BITS, _LAST_KERNEL_ID = tl.constexpr(ID_BITS), tl.constexpr(_LAST_ID)
_UNIT, _LARGEST = tl.constexpr(UNIT), tl.constexpr(LARGEST)

_TILE = 4096  # ids per program


def scores_of_reference(
    logits: Tensor, vocab_start: int, vocab_size: int, rows: Tensor | None = None
) -> Tensor:
    """Plain torch version of `scores_of`."""
    chosen = logits if rows is None else logits[rows]
    scores = _empty_scores(chosen.shape[0], logits)
    with_spare_column(scores).fill_(-torch.inf)
    known = max(0, min(logits.shape[1], vocab_size - vocab_start))  # ids beyond are padding
    scores[:, :known] = chosen[:, :known]
    return scores.masked_fill_(scores.isnan(), -torch.inf)


@triton.jit
def _scores_kernel(
    logits_ptr: tl.tensor,  # [L, Vl]
    rows_ptr: tl.tensor,  # [S] int64
    scores_ptr: tl.tensor,  # [S, stride] fp32
    logits_stride: tl.tensor,
    stride: tl.tensor,
    known: tl.tensor,  # columns before the padding
    HAS_ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_ROWS:
        source = tl.load(rows_ptr + row)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logits = tl.load(
        logits_ptr + source * logits_stride + cols, mask=cols < known, other=-float("inf")
    ).to(tl.float32)
    scores = tl.where(logits == logits, logits, -float("inf"))  # NaN differs from itself
    tl.store(scores_ptr + row * stride + cols, scores, mask=cols < stride)


def scores_of_triton(
    logits: Tensor, vocab_start: int, vocab_size: int, rows: Tensor | None = None
) -> Tensor:
    """Launch the kernel; see `scores_of`."""
    scores = _empty_scores(logits.shape[0] if rows is None else rows.shape[0], logits)
    stride = scores.stride(0)
    _scores_kernel[(scores.shape[0], triton.cdiv(stride, _TILE))](
        logits,
        logits if rows is None else rows,
        scores,
        logits.stride(0),
        stride,
        max(0, min(logits.shape[1], vocab_size - vocab_start)),
        HAS_ROWS=rows is not None,
        TILE=_TILE,
    )
    return scores


def scores_of(
    logits: Tensor, vocab_start: int, vocab_size: int, rows: Tensor | None = None
) -> Tensor:
    """Return rows of logits in float32, with -inf for padding and NaN: [S, Vl], rows strided.

    At least one more column follows each row and takes scattered writes to ids of other ranks: see
    `with_spare_column`.

    Args:
        logits: [L, Vl], last dimension contiguous
        rows: [S] int64; None for all rows
    """
    copy = scores_of_triton if logits.is_cuda else scores_of_reference
    return copy(logits, vocab_start, vocab_size, rows)


def _empty_scores(num_rows: int, logits: Tensor) -> Tensor:
    local_size = logits.shape[1]
    memory = logits.new_empty(num_rows, local_size + 8 - local_size % 8, dtype=torch.float32)
    return memory[:, :local_size]


def with_spare_column(scores: Tensor) -> Tensor:
    """Return the memory of `scores_of`'s result as [S, stride], stride > Vl: column Vl is spare."""
    num_rows, width = scores.shape[0], scores.stride(0)
    memory: Tensor = scores.as_strided((num_rows, width), (width, 1))
    return memory


def sortable(logits: Tensor) -> Tensor:
    """Return int64 numbers that sort as the float32 logits do; -0 and 0 give the same number."""
    bits = (logits + 0.0).view(torch.int32).long()
    return bits ^ ((bits >> 31) & _SIGN_MASK)


def keys_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the int64 keys of float32 logits and their ids, of shapes that broadcast."""
    keys: Tensor = (sortable(logits) << ID_BITS) + (_LAST_ID - ids)
    return keys


def logits_and_ids(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 logits and int32 ids of keys: the inverse of `keys_of`."""
    bits = keys >> ID_BITS
    logits = (bits ^ ((bits >> 31) & _SIGN_MASK)).int().view(torch.float32)
    return logits, (_LAST_ID - (keys & _LAST_ID)).int()


def rank_and_mass_reference(
    scores: Tensor, keys: Tensor, largest: Tensor, vocab_start: int
) -> Tensor:
    """Plain torch version of `rank_and_mass`."""
    ids = torch.arange(vocab_start, vocab_start + scores.shape[1], device=scores.device)
    num_above = (keys_of(scores, ids) >= keys.unsqueeze(1)).sum(dim=1)
    weights = weights_of(scores, largest, torch.ones_like(largest))
    return torch.stack([num_above, weights.sum(dim=1)], dim=1)


def weights_of(scores: Tensor, largest: Tensor, temperatures: Tensor) -> Tensor:
    """Plain torch version of `weights_in_kernel`, of rows [n, V]; largest, temperatures [n]."""
    # float64, because torch may compute a vector's last elements with another fp32 exponential
    below = scores.double() - largest.double().clamp(-LARGEST, LARGEST).unsqueeze(1)
    below /= temperatures.double().unsqueeze(1)
    return (below.clamp(max=0.0).exp() * UNIT).long()


@triton.jit
def keys_in_kernel(scores: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Return the int64 keys of scores and ids, as `keys_of`."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 is 0
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << _ID_BITS) + (_LAST_KERNEL_ID - ids)


@triton.jit
def weights_in_kernel(scores: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Return probabilities as multiples of 1 / UNIT of the likeliest token's: int64."""
    largest = tl.minimum(tl.maximum(largest, -_LARGEST), _LARGEST)
    below = tl.minimum((scores - largest) / temperature, 0.0)
    return (tl.exp(below) * _UNIT).to(tl.int64)


@triton.jit
def _rank_and_mass_kernel(
    scores_ptr: tl.tensor,  # [n, Vl]
    keys_ptr: tl.tensor,  # [n] int64
    largest_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [n, 2] int64, zeros
    scores_stride: tl.tensor,
    local_size: tl.tensor,  # Vl
    vocab_start: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = cols < local_size
    score_ptrs = scores_ptr + row.to(tl.int64) * scores_stride + cols
    scores = tl.load(score_ptrs, mask=mask, other=-float("inf"))
    hit = (keys_in_kernel(scores, vocab_start + cols) >= tl.load(keys_ptr + row)) & mask
    weights = weights_in_kernel(scores, tl.load(largest_ptr + row), 1.0)
    # integers, so the order of these additions does not matter
    tl.atomic_add(out_ptr + 2 * row, tl.sum(hit.to(tl.int64), axis=0))
    tl.atomic_add(out_ptr + 2 * row + 1, tl.sum(tl.where(mask, weights, 0), axis=0))


def rank_and_mass_triton(scores: Tensor, keys: Tensor, largest: Tensor, vocab_start: int) -> Tensor:
    """Launch the kernel; see `rank_and_mass`."""
    num_rows, local_size = scores.shape
    out = torch.zeros(num_rows, 2, dtype=torch.int64, device=scores.device)
    _rank_and_mass_kernel[(num_rows, triton.cdiv(local_size, _TILE))](
        scores,
        keys,
        largest,
        out,
        scores.stride(0),
        local_size,
        vocab_start,
        TILE=_TILE,
        num_warps=8,
    )
    return out


def rank_and_mass(scores: Tensor, keys: Tensor, largest: Tensor, vocab_start: int) -> Tensor:
    """Return how many of this rank's tokens have a key of `keys` or larger, and all tokens' weight.

    Sums over the ranks give both for the whole vocabulary. A token's weight is
    exp(score - largest) * UNIT, rounded down.

    Args:
        scores: [n, Vl] float32, no NaN, last dimension contiguous
        keys: [n] int64, contiguous
        largest: [n] float32, the largest score of all ranks

    Returns:
        [n, 2] int64.
    """
    apply = rank_and_mass_triton if scores.is_cuda else rank_and_mass_reference
    return apply(scores, keys, largest, vocab_start)
