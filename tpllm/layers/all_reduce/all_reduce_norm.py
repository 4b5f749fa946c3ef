"""All-reduce, residual addition and RMSNorm in one kernel, over peer memory.

N tokens, E hidden_size. The alternative is NCCL's all-reduce and then `rms_norm`: two kernels, and
for the few megabytes of a decode step NCCL's latency is most of the time. Terms are added in rank
order, so all ranks have the same bits. Two ways to do it:

- one-shot: every rank sends its terms to all others, and all add up everything. It takes one way
  over the link and (size - 1) * N * E elements sent by each rank.
- two-shot: every rank adds up and norms its share of the rows, for which it gets the others' terms,
  and sends the result to all. Two ways over the link, 2 * (size - 1) / size * N * E elements, and
  each rank keeps the residual stream of its own rows only.

Roofline: one way over the link takes some 2 us, and its bytes go at 395 GB/s. 185 rows of 4096 in
bf16 over two H200, one shot, 1.5 MB: 3.8 us of bytes; a step takes 8.3 us for it. Over four, two
shots, 2.3 MB: 5.7 us; 13.6. A prompt step of 16,384 rows over four: 510 us of bytes; 690.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.layers.all_reduce.overlapped import overlapped_all_reduce_norm
from tpllm.layers.dependent_launch import dependent_launch
from tpllm.layers.norm import RMSNorm, add_and_norm, row_warps
from tpllm.parallel.collectives import all_reduce
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup
from tpllm.parallel.peer_memory import NUM_PLACES, WIDTH_MULTIPLE

_NUM_PLACES = tl.constexpr(NUM_PLACES)


@triton.jit
def empty_like(row: tl.tensor) -> tl.tensor:
    """What a peer buffer holds before the row is there, negative zeros, as integers."""
    if row.dtype.primitive_bitwidth == 32:
        empty = tl.full(row.shape, -(2**31), tl.int32)
    else:
        empty = tl.full(row.shape, -(2**15), tl.int16)
    return empty


@triton.jit
def sendable(row: tl.tensor) -> tl.tensor:
    """The row without negative zeros, which would look empty."""
    return tl.where(row == 0.0, 0.0, row)


@triton.jit
def _is_missing(row: tl.tensor) -> tl.tensor:
    """1 for each value of a peer buffer's row that is not there yet: int32."""
    empty = empty_like(row)
    return (row.to(empty.dtype, bitcast=True) == empty).to(tl.int32)


@triton.jit
def _make_empty(row_ptrs: tl.tensor, row: tl.tensor, mask: tl.tensor) -> None:
    """Make room for the next row like this one."""
    tl.store(row_ptrs, empty_like(row).to(row.dtype, bitcast=True), mask=mask)


@triton.jit
def take(row_ptrs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Wait for a row in this rank's peer buffer, empty its place and return it.

    Each value tells by itself whether it has come, so the order of arrival does not matter.
    """
    row = tl.load(row_ptrs, mask=mask, other=0.0, volatile=True)
    while tl.max(_is_missing(row), axis=0) != 0:
        row = tl.load(row_ptrs, mask=mask, other=0.0, volatile=True)
    _make_empty(row_ptrs, row, mask)
    return row


@triton.jit
def _peer_buffer(
    peer_buffer_ptrs: tl.tensor,
    rank: tl.tensor,
    sender: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    max_rows: tl.tensor,
    dtype: tl.constexpr,
    E: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Where the rank finds that row of the sender: a pointer to its first element."""
    peer_buffers = tl.load(peer_buffer_ptrs.to(tl.pointer_type(tl.uint64)) + rank)
    offset = ((place * SIZE + sender).to(tl.int64) * max_rows + row) * E
    return tl.multiple_of(peer_buffers.to(tl.pointer_type(dtype)), 16) + tl.multiple_of(offset, 8)


@triton.jit
def _send(row_ptrs: tl.tensor, row: tl.tensor, mask: tl.tensor) -> None:
    # through all caches, now, and not when the kernel ends
    tl.store(row_ptrs, sendable(row), mask=mask, cache_modifier=".wt")


@triton.jit
def _send_to_all(
    x: tl.tensor,
    mask: tl.tensor,
    cols: tl.tensor,
    peer_buffer_ptrs: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    max_rows: tl.tensor,
    E: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Send x to that row of every peer's peer buffer."""
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            box = _peer_buffer(peer_buffer_ptrs, peer, RANK, place, row, max_rows, x.dtype, E, SIZE)
            _send(box + cols, x, mask)


@triton.jit
def _look(
    x: tl.tensor,
    mask: tl.tensor,
    cols: tl.tensor,
    peer_buffer_ptrs: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    max_rows: tl.tensor,
    E: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sum of x and of what the peer buffers hold, and how much of it is still empty."""
    missing = tl.zeros(x.shape, dtype=tl.int32)
    total = tl.zeros(x.shape, dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        term = x
        if peer != RANK:
            box = _peer_buffer(peer_buffer_ptrs, RANK, peer, place, row, max_rows, x.dtype, E, SIZE)
            term = tl.load(box + cols, mask=mask, other=0.0, volatile=True)
            missing += _is_missing(term)
        total += term.to(tl.float32)
    return total, tl.max(missing, axis=0)


@triton.jit
def _sum_of_terms(
    x: tl.tensor,
    mask: tl.tensor,
    cols: tl.tensor,
    peer_buffer_ptrs: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    max_rows: tl.tensor,
    E: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """x and what every peer has sent to that row, added in rank order: fp32.

    All peers' rows are looked for at the same time, as `take` looks for one: each look costs a
    way to memory and a sum over the program's threads.
    """
    total, num_missing = _look(x, mask, cols, peer_buffer_ptrs, place, row, max_rows, E, RANK, SIZE)
    while num_missing != 0:
        total, num_missing = _look(
            x, mask, cols, peer_buffer_ptrs, place, row, max_rows, E, RANK, SIZE
        )
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            box = _peer_buffer(peer_buffer_ptrs, RANK, peer, place, row, max_rows, x.dtype, E, SIZE)
            _make_empty(box + cols, x, mask)
    return total


@triton.jit
def _fence() -> None:
    """What a thread did before is done, for all GPUs, before what it does after."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["max_rows", "has_residual"])
def _all_reduce_norm_one_shot(
    x_ptr: tl.tensor,  # [N, E]
    peer_buffer_ptrs: tl.tensor,
    places_ptr: tl.tensor,  # [max_rows]
    residual_ptr: tl.tensor,  # [N, E]
    weight_ptr: tl.tensor,  # [E]
    out_ptr: tl.tensor,  # [N, E]
    max_rows: tl.tensor,
    eps: tl.tensor,
    has_residual: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one row. Every rank adds up every row."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    dtype = x_ptr.dtype.element_ty
    offsets = row.to(tl.int64) * E + cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    place = tl.load(places_ptr + row)
    _send_to_all(x, mask, cols, peer_buffer_ptrs, place, row, max_rows, E, RANK, SIZE)
    if PDL:
        gdc_launch_dependents()
    residual = tl.load(residual_ptr + offsets, mask=mask & (has_residual != 0), other=0.0)
    total = _sum_of_terms(x, mask, cols, peer_buffer_ptrs, place, row, max_rows, E, RANK, SIZE)
    # not before all threads have read it: the sum over them in `_look` holds a barrier
    tl.store(places_ptr + row, (place + 1) % _NUM_PLACES)
    total, normed = add_and_norm(total, residual.to(tl.float32), weight, dtype, eps, E)
    tl.store(residual_ptr + offsets, total, mask=mask)
    tl.store(out_ptr + offsets, normed, mask=mask)


@triton.jit(do_not_specialize=["max_rows", "num_rows", "has_residual"])
def _all_reduce_norm_two_shot(
    x_ptr: tl.tensor,  # [N, E]
    peer_buffer_ptrs: tl.tensor,
    places_ptr: tl.tensor,  # [max_rows]
    residual_ptr: tl.tensor,  # [N, E], of which this rank keeps every SIZE-th row
    weight_ptr: tl.tensor,  # [E]
    out_ptr: tl.tensor,  # [N, E]
    max_rows: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    has_residual: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program: groups of ROWS rows, one after the other; ROWS is 1 or SIZE.

    Of SIZE rows each rank adds up one, and sends it to the others normed. Terms go through the
    program's peer buffer row, normed rows through the one max_rows / 2 behind it.
    """
    program = tl.program_id(0)
    behind = program + max_rows // 2
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    dtype = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    place, place_behind = tl.load(places_ptr + program), tl.load(places_ptr + behind)
    first = program * ROWS
    while first < num_rows:
        for i in tl.static_range(ROWS):
            row = first + i
            adder = row % SIZE
            if (row < num_rows) & (adder != RANK):
                x = tl.load(x_ptr + row.to(tl.int64) * E + cols, mask=mask, other=0.0)
                box = _peer_buffer(
                    peer_buffer_ptrs, adder, RANK, place, program, max_rows, dtype, E, SIZE
                )
                _send(box + cols, x, mask)
        ours = first if ROWS == 1 else first + RANK
        if (ours < num_rows) & (ours % SIZE == RANK):
            offsets = ours.to(tl.int64) * E + cols
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            residual = tl.load(residual_ptr + offsets, mask=mask & (has_residual != 0), other=0.0)
            total = _sum_of_terms(
                x, mask, cols, peer_buffer_ptrs, place, program, max_rows, E, RANK, SIZE
            )
            total, normed = add_and_norm(total, residual.to(tl.float32), weight, dtype, eps, E)
            normed = sendable(normed.to(dtype))  # for this rank, too: all have the same bits
            _send_to_all(
                normed, mask, cols, peer_buffer_ptrs, place_behind, behind, max_rows, E, RANK, SIZE
            )
            tl.store(residual_ptr + offsets, total, mask=mask)
            tl.store(out_ptr + offsets, normed, mask=mask)
        for i in tl.static_range(ROWS):
            row = first + i
            adder = row % SIZE
            if (row < num_rows) & (adder != RANK):
                box = _peer_buffer(
                    peer_buffer_ptrs, RANK, adder, place_behind, behind, max_rows, dtype, E, SIZE
                )
                out_ptrs = out_ptr + row.to(tl.int64) * E + cols
                tl.store(out_ptrs, take(box + cols, mask), mask=mask)
        # What was taken is empty for all to see before the next rows tell a peer that it may send
        # to the same place again.
        _fence()
        tl.debug_barrier()
        place = (place + 1) % _NUM_PLACES
        place_behind = (place_behind + 1) % _NUM_PLACES
        first += tl.num_programs(0) * ROWS
    tl.store(places_ptr + program, place)
    tl.store(places_ptr + behind, place_behind)


def kept_rows(num_rows: int, tp: TPGroup) -> slice:
    """The rows of the residual stream that this rank keeps: all of few, its share of many."""
    if tp.peers is None or num_rows <= tp.peers.one_shot_rows:
        return slice(None)
    return slice(tp.rank, None, tp.size)


def all_reduce_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, tp: TPGroup, *, has_residual: bool
) -> Tensor:
    """Add up all ranks' x over peer memory, and norm the result.

    Args:
        x: [N, E] contiguous, this rank's partial sum
        residual: [N, E] contiguous; the sum is added to it in place, or, unless `has_residual`,
            written there. This holds for `kept_rows` alone, others may stay as they are
        weight: [E]

    Returns:
        The normalised sum [N, E].
    """
    N, E = x.shape
    peers = tp.peers
    assert peers is not None and E % WIDTH_MULTIPLE == 0
    assert x.is_contiguous() and residual.is_contiguous()
    out = torch.empty_like(x)
    block = triton.next_power_of_2(E)
    num_warps = row_warps(block)
    sizes = {"E": E, "BLOCK": block, "RANK": tp.rank, "SIZE": tp.size}
    launch: dict[str, bool] = {}
    if peers.one_shot_rows >= N:
        kernel, num_programs, num_rows = _all_reduce_norm_one_shot, N, []
        launch = dependent_launch(x.device, N)
    else:
        most = peers.max_rows // 2
        # a row alone is through sooner; of more than fit at a time several share the ways
        sizes["ROWS"] = 1 if most >= N else tp.size
        num_programs = min(triton.cdiv(N, sizes["ROWS"]), most)
        kernel, num_rows = _all_reduce_norm_two_shot, [N]
    kernel[(num_programs,)](
        x,
        peers.peer_buffer_ptrs,
        peers.places,
        residual,
        weight,
        out,
        peers.max_rows,
        *num_rows,
        eps,
        int(has_residual),
        num_warps=num_warps,
        # At least two programs of any width fit on a multiprocessor. With one, rows beyond the
        # 132nd waited for the ends of others: 185 rows of 8B on four GPUs 18.3 us, 128 rows 11.9.
        maxnreg=min(255, 1024 // num_warps),
        **sizes,
        **launch,
    )
    return out


class AllReduceRMSNorm(RMSNorm):
    """RMSNorm of a sum that is still in parts: each rank brings its term.

    The sum, the residual addition and the norm are one kernel where there is peer memory;
    otherwise, or on one rank, an all-reduce and the norm.

    Shapes:
        x [N, E], this rank's partial sum; the normed sum [N, E], equal on every rank; the residual
        [N, E], for the next norm of the same N tokens and for nobody else: see `kept_rows`, and,
        for a half of a step in its copy stream, `overlapped_all_reduce_norm`
    """

    def __init__(self, hidden_size: int, eps: float, *, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, eps, dtype=dtype, device=tp.device)
        self.tp = tp

    def forward(
        self, x: Tensor, residual: Tensor | None = None, copy_stream: CopyStream | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (normed, residual), the residual now holding the sum that was normalised."""
        if copy_stream is not None:
            return overlapped_all_reduce_norm(
                x, residual, self.weight, self.eps, self.tp, copy_stream
            )
        if self.tp.peers is None:
            return super().forward(all_reduce(x, self.tp), residual)
        has_residual = residual is not None
        if residual is None:
            residual = torch.empty_like(x)
        normed = all_reduce_norm(
            x, residual, self.weight, self.eps, self.tp, has_residual=has_residual
        )
        return normed, residual
