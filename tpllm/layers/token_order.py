"""The order of tokens by logit, ties by id, and exact sums over the tokens from a point of it on.

S sequences, V vocab_size, Vl ids on this rank, B points.

A token's place in the order is one number, its key: `(bits of the logit, made to sort as the logit
does) * 2**20 + (2**20 - 1 - id)`, so that larger is likelier and of equal logits the lower id comes
first. Whatever cuts the vocabulary (top-k, top-p, min-p) cuts this order somewhere, and a cut is
the smallest key that stays.

Sums are of int64, so they are the same in any order, split over ranks in any way: either every
token counts 1, or its probability as a whole multiple of 2**-40 of the likeliest one's. Less than
half of 2**-40 a token is lost, which over 150,000 tokens is 7e-8 of the whole.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tpllm.parallel.collectives import all_gather
from tpllm.parallel.group import TPGroup

ID_BITS = 20
KEY_BITS = 32 + ID_BITS
LOWEST_KEY = -(2 ** (KEY_BITS - 1))  # at or below every token's
UNIT = 2.0**40  # the weight of the likeliest token
_LAST_ID = 2**ID_BITS - 1
_SIGN_MASK = 0x7FFFFFFF
LARGEST = torch.finfo(torch.float32).max  # bounds what is subtracted: no infinity less another

Sums = Callable[[Tensor], Tensor]  # from points [S, B] int64 (keys) on: [S, B] int64

_TILE = 8192  # ids a program
_SUB_TILE = 256  # ids a step of it
_COPY_TILE = 4096  # ids a program that copies


def scores_of_reference(
    logits: Tensor, vocab_start: int, vocab_size: int, rows: Tensor | None = None
) -> Tensor:
    """What `scores_of` does, in plain torch."""
    chosen = logits if rows is None else logits[rows]
    scores = _empty_scores(chosen.shape[0], logits)
    with_spare_column(scores).fill_(-torch.inf)
    known = max(0, min(logits.shape[1], vocab_size - vocab_start))  # the rest is padding
    scores[:, :known] = chosen[:, :known]
    return scores.masked_fill_(scores.isnan(), -torch.inf)


@triton.jit
def _scores_kernel(
    logits_ptr: tl.tensor,  # [L, Vl]
    rows_ptr: tl.tensor,  # [S] int64
    scores_ptr: tl.tensor,  # [S, stride] fp32
    logits_stride: tl.tensor,
    stride: tl.tensor,
    known: tl.tensor,  # columns that are no padding
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
    scores = tl.where(logits == logits, logits, -float("inf"))  # NaN is not
    tl.store(scores_ptr + row * stride + cols, scores, mask=cols < stride)


def scores_of_triton(
    logits: Tensor, vocab_start: int, vocab_size: int, rows: Tensor | None = None
) -> Tensor:
    """Launch the kernel; see `scores_of`."""
    scores = _empty_scores(logits.shape[0] if rows is None else rows.shape[0], logits)
    stride = scores.stride(0)
    _scores_kernel[(scores.shape[0], triton.cdiv(stride, _COPY_TILE))](
        logits,
        logits if rows is None else rows,
        scores,
        logits.stride(0),
        stride,
        max(0, min(logits.shape[1], vocab_size - vocab_start)),
        HAS_ROWS=rows is not None,
        TILE=_COPY_TILE,
    )
    return scores


def scores_of(
    logits: Tensor, vocab_start: int, vocab_size: int, rows: Tensor | None = None
) -> Tensor:
    """A float32 copy of rows of logits, padding and NaN being -inf: [S, Vl], rows strided.

    Behind each row lies at least one column more, for scattered writes that belong nowhere: see
    `with_spare_column`.

    Args:
        logits: [L, Vl], last dimension contiguous
        rows: [S] int64; None for all
    """
    copy = scores_of_triton if logits.is_cuda else scores_of_reference
    return copy(logits, vocab_start, vocab_size, rows)


def _empty_scores(num_rows: int, logits: Tensor) -> Tensor:
    local_size = logits.shape[1]
    memory = logits.new_empty(num_rows, local_size + 8 - local_size % 8, dtype=torch.float32)
    return memory[:, :local_size]


def with_spare_column(scores: Tensor) -> Tensor:
    """The memory of `scores_of`'s result as [S, stride], stride > Vl: column Vl is free."""
    num_rows, width = scores.shape[0], scores.stride(0)
    memory: Tensor = scores.as_strided((num_rows, width), (width, 1))
    return memory


def sortable(logits: Tensor) -> Tensor:
    """int64 numbers that sort as the float32 logits do; -0 and 0 give the same."""
    bits = (logits + 0.0).view(torch.int32).long()
    return bits ^ ((bits >> 31) & _SIGN_MASK)


def keys_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Keys of float32 logits and their ids, of shapes that broadcast: int64."""
    keys: Tensor = (sortable(logits) << ID_BITS) + (_LAST_ID - ids)
    return keys


def logits_and_ids(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `keys_of` was given: float32 logits and int32 ids."""
    bits = keys >> ID_BITS
    logits = (bits ^ ((bits >> 31) & _SIGN_MASK)).int().view(torch.float32)
    return logits, (_LAST_ID - (keys & _LAST_ID)).int()


def max_over_ranks(values: Tensor, tp: TPGroup) -> Tensor:
    """Elementwise maximum over the ranks."""
    return all_gather(values, tp).amax(dim=0)


def token_sums_reference(
    scores: Tensor, vocab_start: int, weights_of: tuple[Tensor, Tensor] | None = None
) -> Sums:
    """What `token_sums_triton` gives, in plain torch: sorts once, then looks up."""
    ids = torch.arange(vocab_start, vocab_start + scores.shape[1], device=scores.device)
    keys, order = keys_of(scores, ids).sort(dim=1)  # [S, Vl]
    weights = torch.ones_like(keys)
    if weights_of is not None:
        largest, temperatures = (each.double().unsqueeze(1) for each in weights_of)
        # float64, because torch may take a vector's last elements through another fp32 exponential
        below = (scores.double() - largest.clamp(-LARGEST, LARGEST)) / temperatures
        weights = (below.clamp(max=0.0).exp() * UNIT).long().gather(1, order)
    sums_before = F.pad(weights.cumsum(dim=1), (1, 0))  # [S, Vl + 1]

    def sums(points: Tensor) -> Tensor:
        return sums_before[:, -1:] - sums_before.gather(1, torch.searchsorted(keys, points))

    return sums


@triton.jit
def keys_in_kernel(scores: tl.tensor, ids: tl.tensor, ID_BITS: tl.constexpr) -> tl.tensor:
    """As `keys_of`."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 is 0
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << ID_BITS) + ((1 << ID_BITS) - 1 - ids)


@triton.jit
def weights_in_kernel(
    scores: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    UNIT: tl.constexpr,
    LARGEST: tl.constexpr,
) -> tl.tensor:
    """Probabilities as whole multiples of 1 / UNIT of the likeliest token's: int64."""
    largest = tl.minimum(tl.maximum(largest, -LARGEST), LARGEST)
    below = tl.minimum((scores - largest) / temperature, 0.0)
    return (tl.exp(below) * UNIT).to(tl.int64)


@triton.jit(do_not_specialize=["num_points"])
def _token_sums_kernel(
    scores_ptr: tl.tensor,  # [S, Vl]
    points_ptr: tl.tensor,  # [S, B] int64
    largest_ptr: tl.tensor,  # [S]
    temperatures_ptr: tl.tensor,  # [S]
    sums_ptr: tl.tensor,  # [S, B] int64, zeros
    scores_stride: tl.tensor,
    local_size: tl.tensor,  # Vl
    vocab_start: tl.tensor,
    num_points: tl.tensor,  # B
    WEIGHTED: tl.constexpr,
    ID_BITS: tl.constexpr,
    UNIT: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    SUB_TILE: tl.constexpr,
    POINTS: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0), tl.program_id(1)
    point = tl.arange(0, POINTS)
    wanted = point < num_points
    points = tl.load(points_ptr + row * num_points + point, mask=wanted, other=0)
    row_ptr = scores_ptr + row.to(tl.int64) * scores_stride
    sums = tl.zeros([POINTS, SUB_TILE], dtype=tl.int64)
    for first in range(0, TILE, SUB_TILE):
        cols = tile * TILE + first + tl.arange(0, SUB_TILE)
        mask = cols < local_size
        scores = tl.load(row_ptr + cols, mask=mask, other=-float("inf"))
        keys = keys_in_kernel(scores, vocab_start + cols, ID_BITS)
        if WEIGHTED:
            largest, temperature = tl.load(largest_ptr + row), tl.load(temperatures_ptr + row)
            weights = weights_in_kernel(scores, largest, temperature, UNIT, LARGEST)
        else:
            weights = tl.full([SUB_TILE], 1, dtype=tl.int64)
        hit = (keys[None, :] >= points[:, None]) & mask[None, :]
        sums += tl.where(hit, weights[None, :], 0)
    # sums of integers: the order of these additions does not matter
    tl.atomic_add(sums_ptr + row * num_points + point, tl.sum(sums, axis=1), mask=wanted)


def token_sums_triton(
    scores: Tensor, vocab_start: int, weights_of: tuple[Tensor, Tensor] | None = None
) -> Sums:
    """Sums over this rank's tokens, to be asked for any points of the order.

    Args:
        scores: [S, Vl] float32, no NaN, last dimension contiguous
        weights_of: None to count tokens; or (largest score [S] over all ranks, temperature [S]
            above 0), and a token weighs exp((score - largest) / temperature) * UNIT, rounded down
    """
    num_rows, local_size = scores.shape
    tile = min(_TILE, triton.next_power_of_2(max(local_size, _SUB_TILE)))
    largest, temperatures = weights_of or (scores, scores)

    def sums(points: Tensor) -> Tensor:
        num_points = points.shape[1]
        out = torch.zeros_like(points, memory_format=torch.contiguous_format)
        _token_sums_kernel[(num_rows, triton.cdiv(local_size, tile))](
            scores,
            points.contiguous(),
            largest,
            temperatures,
            out,
            scores.stride(0),
            local_size,
            vocab_start,
            num_points,
            WEIGHTED=weights_of is not None,
            ID_BITS=ID_BITS,
            UNIT=UNIT,
            LARGEST=LARGEST,
            TILE=tile,
            SUB_TILE=_SUB_TILE,
            POINTS=triton.next_power_of_2(num_points),
            num_warps=8,
        )
        return out

    return sums


def token_sums(
    scores: Tensor, vocab_start: int, weights_of: tuple[Tensor, Tensor] | None = None
) -> Sums:
    """See `token_sums_triton`."""
    implementation = token_sums_triton if scores.is_cuda else token_sums_reference
    return implementation(scores, vocab_start, weights_of)
