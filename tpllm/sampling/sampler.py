"""Sample the next token of every sequence from logits that are split over the ranks by vocabulary.

S rows, V vocab_size, Vl ids on this rank, C candidates.

Temperature sampling uses the Gumbel-max trick: the id with the largest `logit + T * gumbel(seed,
position, id)` is distributed as softmax(logits / T), and a maximum can be taken slice by slice.
Each rank finds its best (score, id) of every sequence, and ranks exchange these pairs, not the
logits. The noise depends on the id, not on the batch or the rank, so a seed gives the same token on
any number of GPUs. The noise is multiplied by T because dividing the logit could overflow at a tiny
T.

Pairs travel as int32 [C, 2, S]: plane 0 holds the bits of the fp32 scores, plane 1 the ids.

Source: Maddison, Tarlow, Minka (2014), "A* Sampling", https://arxiv.org/abs/1411.0030, section 2
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.channel.row_record import MAX_STOP_IDS, column, row_words
from tpllm.parallel.collectives import all_gather
from tpllm.parallel.group import TPGroup
from tpllm.sampling.gumbel import (
    gumbel_from_bits,
    gumbel_reference,
    noise_bits,
    noise_bits_reference,
)
from tpllm.sampling.row_table import SampledRows

_TILE = 2048  # ids per program: 75 programs for one sequence of Qwen3, enough to fill a GPU
_NO_ID = tl.constexpr(2**31 - 1)  # above every token id
# words of a row's record, and the first words of its fields
_ROW_WORDS = tl.constexpr(row_words())
_TEMPERATURE, _SEED = tl.constexpr(column("temperature")), tl.constexpr(column("seed"))
_MIN_POSITION, _STOP_IDS = tl.constexpr(column("min_position")), tl.constexpr(column("stop_ids"))


@dataclass(frozen=True)
class Subset:
    """Rows whose candidates are found alone, because their logits come from elsewhere.

    Attributes:
        where: [n] int64, indices of the rows
        is_compact: whether the logits are those of these rows alone, [n, Vl]; otherwise [S, Vl]
        candidates: of all rows, from an earlier call, to which those of these rows are added
    """

    where: Tensor
    is_compact: bool = False
    candidates: Tensor | None = None


def local_candidates_reference(
    logits: Tensor,
    rows: SampledRows,
    vocab_start: int,
    vocab_size: int,
    subset: Subset | None = None,
) -> Tensor:
    """Plain torch version of `local_candidates_triton`, with the whole slice as one tile."""
    if subset is not None:
        where, candidates = subset.where, subset.candidates
        chosen = logits if subset.is_compact else logits[where]
        found = local_candidates_reference(chosen, rows.at(where), vocab_start, vocab_size)
        if candidates is None:
            candidates = found.new_empty(1, 2, rows.rows.numel())
        candidates[:, :, where] = found
        return candidates
    local_size = logits.shape[1]
    scores = logits.to(torch.float32, copy=True)  # [S, Vl]
    temperatures = rows.column("temperature")
    random_rows = (temperatures > 0).nonzero().squeeze(1)
    if random_rows.numel():
        seeds, positions = rows.column("seed")[random_rows], rows.positions[random_rows]
        bits = noise_bits_reference(seeds, positions, vocab_start, local_size)
        scores[random_rows] += temperatures[random_rows].unsqueeze(1) * gumbel_reference(bits)
    scores[:, max(vocab_size - vocab_start, 0) :] = -torch.inf
    early = (rows.positions < rows.column("min_position")).unsqueeze(1)  # [S, 1]
    stop_ids = rows.column("stop_ids")  # [S, MAX_STOP_IDS]
    stop_cols = stop_ids - vocab_start
    banned = early & (stop_ids >= 0) & (stop_cols >= 0) & (stop_cols < local_size)
    scores[banned.nonzero()[:, 0], stop_cols[banned]] = -torch.inf
    scores.masked_fill_(scores.isnan(), -torch.inf)
    best_scores, best_cols = scores.max(dim=1)  # the first of equal scores
    best_ids = (best_cols + vocab_start).int()
    return torch.stack([best_scores.view(torch.int32), best_ids]).unsqueeze(0)  # [1, 2, S]


def best_candidate_reference(candidates: Tensor) -> Tensor:
    """Plain torch version of `best_candidate_triton`."""
    scores, ids = candidates[:, 0].view(torch.float32), candidates[:, 1]  # [C, S] each
    best_scores = scores.amax(dim=0)
    best_ids = ids.masked_fill(scores != best_scores, _NO_ID.value).amin(dim=0)
    return torch.stack([best_scores.view(torch.int32), best_ids])  # [2, S]


@triton.jit
def _best(scores: tl.tensor, ids: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the highest score, and the lowest id with that score."""
    best_score = tl.max(scores, axis=0)
    return best_score, tl.min(tl.where(scores == best_score, ids, _NO_ID), axis=0)


@triton.jit
def _store_pair(
    pair_ptr: tl.tensor, num_rows: tl.tensor, score: tl.tensor, token_id: tl.tensor
) -> None:
    tl.store(pair_ptr, score.to(tl.int32, bitcast=True))
    tl.store(pair_ptr + num_rows, token_id)


@triton.jit(do_not_specialize=["num_rows"])
def _local_candidates_kernel(
    logits_ptr: tl.tensor,  # [S, Vl]; [n, Vl] if compact
    table_ptr: tl.tensor,  # [R, _ROW_WORDS]
    rows_ptr: tl.tensor,  # [S]
    positions_ptr: tl.tensor,  # [S]
    where_ptr: tl.tensor,  # [n] int64
    candidates_ptr: tl.tensor,  # [tiles, 2, S]
    logits_stride: tl.tensor,
    num_rows: tl.tensor,
    local_size: tl.tensor,  # Vl
    num_stop_ids: tl.tensor,
    aligned_start: tl.tensor,  # the rank's first id, rounded down to a multiple of 4
    shift: tl.tensor,  # ids between aligned_start and the rank's first id
    vocab_size: tl.tensor,
    HAS_WHERE: tl.constexpr,
    IS_COMPACT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0), tl.program_id(1)
    source = row
    if HAS_WHERE:
        row = tl.load(where_ptr + row).to(tl.int32)
        if not IS_COMPACT:
            source = row
    record_ptr = table_ptr + tl.load(rows_ptr + row) * _ROW_WORDS
    first_id = aligned_start + tile * TILE
    ids = first_id + tl.arange(0, TILE)  # [TILE]
    cols = tile * TILE + tl.arange(0, TILE) - shift
    mask = (cols >= 0) & (cols < local_size)
    logits_row_ptr = logits_ptr + source.to(tl.int64) * logits_stride  # int64: S * Vl passes 2**31
    scores = tl.load(logits_row_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32)

    position = tl.load(positions_ptr + row)
    temperature = tl.load(record_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    if temperature > 0.0:  # uniform over the program: a greedy row computes no noise
        seed_low, seed_high = tl.load(record_ptr + _SEED), tl.load(record_ptr + _SEED + 1)
        bits = noise_bits(seed_low, seed_high, position, first_id, TILE)
        scores += temperature * gumbel_from_bits(bits)

    # NaN counts as -inf: comparisons with NaN could leave no id at all.
    scores = tl.where((ids < vocab_size) & (scores == scores), scores, -float("inf"))
    if position < tl.load(record_ptr + _MIN_POSITION):
        i = 0
        while i < num_stop_ids:  # Triton's interpreter has no range() over an argument
            stop_id = tl.load(record_ptr + _STOP_IDS + i)
            scores = tl.where(ids == stop_id, -float("inf"), scores)
            i += 1
    # Columns outside the slice are ids of other ranks: they must not win a tie of -inf either.
    score, token_id = _best(scores, tl.where(mask, ids, _NO_ID))
    _store_pair(candidates_ptr + tile * 2 * num_rows + row, num_rows, score, token_id)


def local_candidates_triton(
    logits: Tensor,
    rows: SampledRows,
    vocab_start: int,
    vocab_size: int,
    subset: Subset | None = None,
) -> Tensor:
    """Return the best (score, id) of each tile of this rank's ids: [tiles, 2, S] int32.

    Column j of logits [S, Vl], last dimension contiguous, is the logit of id vocab_start + j. Ids
    from vocab_size on, stop ids before the minimum position, and NaN logits score -inf. Ties go to
    the lowest id.
    """
    local_size, num_rows = logits.shape[1], rows.rows.numel()
    shift = vocab_start % 4  # a Philox call makes the noise of 4 ids: tiles begin at multiples of 4
    num_tiles = triton.cdiv(local_size + shift, _TILE)
    where, candidates = (subset.where, subset.candidates) if subset else (rows.rows, None)
    if candidates is None:
        candidates = rows.rows.new_empty(num_tiles, 2, num_rows)
    _local_candidates_kernel[(where.numel(), num_tiles)](
        logits,
        rows.table,
        rows.rows,
        rows.positions,
        where,
        candidates,
        logits.stride(0),
        num_rows,
        local_size,
        MAX_STOP_IDS,
        vocab_start - shift,
        shift,
        vocab_size,
        HAS_WHERE=subset is not None,
        IS_COMPACT=subset is not None and subset.is_compact,
        TILE=_TILE,
    )
    return candidates


@triton.jit(do_not_specialize=["num_rows"])
def _best_candidate_kernel(
    candidates_ptr: tl.tensor,  # [C, 2, S]
    best_ptr: tl.tensor,  # [2, S]
    num_rows: tl.tensor,
    num_candidates: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    candidate = tl.arange(0, BLOCK)  # [BLOCK]
    mask = candidate < num_candidates
    pair_ptrs = candidates_ptr + candidate * 2 * num_rows + row
    score_bits = tl.load(pair_ptrs, mask=mask, other=0)
    scores = tl.where(mask, score_bits.to(tl.float32, bitcast=True), -float("inf"))
    ids = tl.load(pair_ptrs + num_rows, mask=mask, other=_NO_ID)
    score, token_id = _best(scores, ids)
    _store_pair(best_ptr + row, num_rows, score, token_id)


def best_candidate_triton(candidates: Tensor) -> Tensor:
    """Return the best of each sequence's C candidates [C, 2, S]: [2, S] int32.

    Ties go to the lowest id.
    """
    num_candidates, _, num_rows = candidates.shape
    best = candidates.new_empty(2, num_rows)
    _best_candidate_kernel[(num_rows,)](
        candidates, best, num_rows, num_candidates, BLOCK=triton.next_power_of_2(num_candidates)
    )
    return best


def best_candidate(candidates: Tensor) -> Tensor:
    """Run the kernel on a GPU and the reference elsewhere; see `best_candidate_triton`."""
    best = best_candidate_triton if candidates.is_cuda else best_candidate_reference
    return best(candidates)


def local_candidates(
    logits: Tensor,
    rows: SampledRows,
    vocab_start: int,
    vocab_size: int,
    subset: Subset | None = None,
) -> Tensor:
    """Run the kernel on a GPU and the reference elsewhere; see `local_candidates_triton`."""
    find = local_candidates_triton if logits.is_cuda else local_candidates_reference
    return find(logits, rows, vocab_start, vocab_size, subset)


def best_over_ranks(candidates: Tensor, tp: TPGroup) -> Tensor:
    """Return the id of each row's best candidate [C, 2, S] of all ranks: [S] int32."""
    if tp.size > 1:
        candidates = all_gather(best_candidate(candidates), tp)  # [tp.size, 2, S]
    return best_candidate(candidates)[1]


def sample(
    logits: Tensor, rows: SampledRows, vocab_start: int, vocab_size: int, tp: TPGroup
) -> Tensor:
    """Sample one token id for each row: [S] int32, the same on every rank.

    Args:
        logits: [S, Vl] of any floating dtype, this rank's slice, last dimension contiguous
        vocab_start: id of the slice's first column
        vocab_size: V; ids from V on are padding and are never sampled
    """
    return best_over_ranks(local_candidates(logits, rows, vocab_start, vocab_size), tp)
