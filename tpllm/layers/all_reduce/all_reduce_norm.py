"""All-reduce, residual addition and RMSNorm in one kernel, over peer memory.

N tokens, E hidden_size. The alternative is NCCL's all-reduce followed by `rms_norm`: two kernels.
For the few megabytes of a decode step, most of NCCL's time is latency. Partial sums are added in
rank order, so all ranks have the same bits. There are two algorithms:

- one-shot: every rank sends its partial sums to all others and reduces every row itself. It
  crosses the link once, and each rank sends (size - 1) * N * E elements.
- two-shot: every rank receives the partial sums of its share of the rows, reduces and norms them,
  and sends the result to all. It crosses the link twice, and each rank sends
  2 * (size - 1) / size * N * E elements. Each rank keeps the residual stream of its own rows only.

Roofline: crossing the link takes about 2 us, and its bandwidth is 395 GB/s. `docs/benchmark-log.md`
has the times that were measured beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.architectures.spec import NormSpec
from tpllm.layers.all_reduce.overlapped import overlapped_all_reduce_norm
from tpllm.layers.context import LayerContext
from tpllm.layers.dependent_launch import dependent_launch
from tpllm.layers.norm import RMSNorm, add_and_norm, row_warps
from tpllm.parallel.collectives import all_reduce
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup
from tpllm.parallel.peer_memory import NUM_BUFFERS, WIDTH_MULTIPLE

_NUM_BUFFERS = tl.constexpr(NUM_BUFFERS)


@triton.jit
def empty_bits(row: tl.tensor) -> tl.tensor:
    """Return negative zeros (an empty peer buffer) as integers, in the row's shape."""
    if row.dtype.primitive_bitwidth == 32:
        empty = tl.full(row.shape, -(2**31), tl.int32)
    else:
        empty = tl.full(row.shape, -(2**15), tl.int16)
    return empty


@triton.jit
def sendable(row: tl.tensor) -> tl.tensor:
    """Return the row without negative zeros, which would look like an empty buffer."""
    return tl.where(row == 0.0, 0.0, row)


@triton.jit
def _is_missing(row: tl.tensor) -> tl.tensor:
    """Return 1 (int32) for each value of a peer buffer's row that has not arrived yet."""
    empty = empty_bits(row)
    return (row.to(empty.dtype, bitcast=True) == empty).to(tl.int32)


@triton.jit
def _clear(row_ptrs: tl.tensor, row: tl.tensor, mask: tl.tensor) -> None:
    """Write `EMPTY` into a row of a peer buffer."""
    tl.store(row_ptrs, empty_bits(row).to(row.dtype, bitcast=True), mask=mask)


@triton.jit
def receive(row_ptrs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Poll a row of this rank's peer buffer until it has arrived, clear it and return it.

    Each value shows by itself whether it has arrived, so the order of arrival does not matter.
    """
    row = tl.load(row_ptrs, mask=mask, other=0.0, volatile=True)
    while tl.max(_is_missing(row), axis=0) != 0:
        row = tl.load(row_ptrs, mask=mask, other=0.0, volatile=True)
    _clear(row_ptrs, row, mask)
    return row


# Below, `buffer_row` names a row of the peer buffers: the address of the ranks' addresses, the
# index of the buffer, the row in it, and the rows of a buffer.


@triton.jit
def _row_ptr(
    buffer_row: tl.tuple,
    rank: tl.tensor,
    sender: tl.tensor,
    dtype: tl.constexpr,
    E: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """Return a pointer to the first element of a row in `rank`'s peer buffer for `sender`."""
    peer_buffer_ptrs, buffer_index, row, max_rows = buffer_row
    peer_buffers = tl.load(peer_buffer_ptrs.to(tl.pointer_type(tl.uint64)) + rank)
    offset = ((buffer_index * SIZE + sender).to(tl.int64) * max_rows + row) * E
    return tl.multiple_of(peer_buffers.to(tl.pointer_type(dtype)), 16) + tl.multiple_of(offset, 8)


@triton.jit
def _send(row_ptrs: tl.tensor, row: tl.tensor, mask: tl.tensor) -> None:
    # write through all caches at once, not when the kernel ends
    tl.store(row_ptrs, sendable(row), mask=mask, cache_modifier=".wt")


@triton.jit
def _send_to_all(
    x: tl.tensor, buffer_row: tl.tuple, E: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr
) -> None:
    """Send x [BLOCK] to this row of every peer's peer buffer."""
    cols = tl.arange(0, x.shape[0])
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            row_ptr = _row_ptr(buffer_row, peer, RANK, x.dtype, E, SIZE)
            _send(row_ptr + cols, x, cols < E)


@triton.jit
def _poll(
    x: tl.tensor, buffer_row: tl.tuple, E: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the sum of x and the peer buffers' rows, and a positive number if some are missing."""
    cols = tl.arange(0, x.shape[0])
    missing = tl.zeros(x.shape, dtype=tl.int32)
    total = tl.zeros(x.shape, dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        partial_sum = x
        if peer != RANK:
            row_ptr = _row_ptr(buffer_row, RANK, peer, x.dtype, E, SIZE)
            partial_sum = tl.load(row_ptr + cols, mask=cols < E, other=0.0, volatile=True)
            missing += _is_missing(partial_sum)
        total += partial_sum.to(tl.float32)
    return total, tl.max(missing, axis=0)


@triton.jit
def _reduce_partial_sums(
    x: tl.tensor, buffer_row: tl.tuple, E: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr
) -> tl.tensor:
    """Return the sum of x and of every peer's partial sum, added in rank order, in fp32.

    All peers' rows are polled together, where `receive` polls one: each poll costs a memory access
    and a reduction over the program's threads.
    """
    total, num_missing = _poll(x, buffer_row, E, RANK, SIZE)
    while num_missing != 0:
        total, num_missing = _poll(x, buffer_row, E, RANK, SIZE)
    cols = tl.arange(0, x.shape[0])
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            row_ptr = _row_ptr(buffer_row, RANK, peer, x.dtype, E, SIZE)
            _clear(row_ptr + cols, x, cols < E)
    return total


@triton.jit
def _fence() -> None:
    """Make a thread's earlier memory accesses visible to all GPUs before its later ones."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["max_rows", "has_residual"])
def _all_reduce_norm_one_shot(
    x_ptr: tl.tensor,  # [N, E]
    peer_buffer_ptrs: tl.tensor,
    buffer_indices_ptr: tl.tensor,  # [max_rows]
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
    """Reduce one row in each program; every rank reduces every row."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    dtype = x_ptr.dtype.element_ty
    offsets = row.to(tl.int64) * E + cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    buffer_index = tl.load(buffer_indices_ptr + row)
    buffer_row = (peer_buffer_ptrs, buffer_index, row, max_rows)
    _send_to_all(x, buffer_row, E, RANK, SIZE)
    if PDL:
        gdc_launch_dependents()
    residual = tl.load(residual_ptr + offsets, mask=mask & (has_residual != 0), other=0.0)
    total = _reduce_partial_sums(x, buffer_row, E, RANK, SIZE)
    # safe here: the reduction over threads in `_poll` is a barrier, so all threads have read it
    tl.store(buffer_indices_ptr + row, (buffer_index + 1) % _NUM_BUFFERS)
    total, normed = add_and_norm(total, residual.to(tl.float32), weight, dtype, eps, E)
    tl.store(residual_ptr + offsets, total, mask=mask)
    tl.store(out_ptr + offsets, normed, mask=mask)


@triton.jit(do_not_specialize=["max_rows", "num_rows", "has_residual"])
def _all_reduce_norm_two_shot(
    x_ptr: tl.tensor,  # [N, E]
    peer_buffer_ptrs: tl.tensor,
    buffer_indices_ptr: tl.tensor,  # [max_rows]
    residual_ptr: tl.tensor,  # [N, E]; this rank keeps every SIZE-th row
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
    """Reduce groups of ROWS rows in each program, one group after the other; ROWS is 1 or SIZE.

    Of SIZE rows, each rank reduces one and sends it to the others, normed. Partial sums go through
    row `program` of the peer buffers, normed rows through the row max_rows / 2 after it.
    """
    program = tl.program_id(0)
    result_row = program + max_rows // 2
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    dtype = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    buffer_index, result_buffer = (
        tl.load(buffer_indices_ptr + program),
        tl.load(buffer_indices_ptr + result_row),
    )
    first = program * ROWS
    while first < num_rows:
        partial_sums_row = (peer_buffer_ptrs, buffer_index, program, max_rows)
        outputs_row = (peer_buffer_ptrs, result_buffer, result_row, max_rows)
        for i in tl.static_range(ROWS):
            row = first + i
            owner = row % SIZE
            if (row < num_rows) & (owner != RANK):
                x = tl.load(x_ptr + row.to(tl.int64) * E + cols, mask=mask, other=0.0)
                row_ptr = _row_ptr(partial_sums_row, owner, RANK, dtype, E, SIZE)
                _send(row_ptr + cols, x, mask)
        ours = first if ROWS == 1 else first + RANK
        if (ours < num_rows) & (ours % SIZE == RANK):
            offsets = ours.to(tl.int64) * E + cols
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
            residual = tl.load(residual_ptr + offsets, mask=mask & (has_residual != 0), other=0.0)
            total = _reduce_partial_sums(x, partial_sums_row, E, RANK, SIZE)
            total, normed = add_and_norm(total, residual.to(tl.float32), weight, dtype, eps, E)
            normed = sendable(normed.to(dtype))  # on this rank too: all ranks have the same bits
            _send_to_all(normed, outputs_row, E, RANK, SIZE)
            tl.store(residual_ptr + offsets, total, mask=mask)
            tl.store(out_ptr + offsets, normed, mask=mask)
        for i in tl.static_range(ROWS):
            row = first + i
            owner = row % SIZE
            if (row < num_rows) & (owner != RANK):
                row_ptr = _row_ptr(outputs_row, RANK, owner, dtype, E, SIZE)
                out_ptrs = out_ptr + row.to(tl.int64) * E + cols
                tl.store(out_ptrs, receive(row_ptr + cols, mask), mask=mask)
        # The cleared rows must be visible to all GPUs before the next rows allow a peer to send to
        # the same buffer again.
        _fence()
        tl.debug_barrier()
        buffer_index = (buffer_index + 1) % _NUM_BUFFERS
        result_buffer = (result_buffer + 1) % _NUM_BUFFERS
        first += tl.num_programs(0) * ROWS
    tl.store(buffer_indices_ptr + program, buffer_index)
    tl.store(buffer_indices_ptr + result_row, result_buffer)


def kept_rows(num_rows: int, tp: TPGroup) -> slice:
    """Return the rows of the residual stream that this rank keeps: all (one-shot) or its share."""
    if tp.peers is None or num_rows <= tp.peers.one_shot_rows:
        return slice(None)
    return slice(tp.rank, None, tp.size)


def all_reduce_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, tp: TPGroup, *, has_residual: bool
) -> Tensor:
    """All-reduce x over peer memory, add the residual, and norm the result.

    Args:
        x: [N, E] contiguous, this rank's partial sum
        residual: [N, E] contiguous; overwritten by the sum of x and `residual`, or by the sum of x
            if `has_residual` is false. Only the rows of `kept_rows` are written for certain
        weight: [E]

    Returns:
        The normed sum [N, E].
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
        # one row per program has the lowest latency; groups of rows share the link's latency when
        # there are more rows than programs
        sizes["ROWS"] = 1 if most >= N else tp.size
        num_programs = min(triton.cdiv(N, sizes["ROWS"]), most)
        kernel, num_rows = _all_reduce_norm_two_shot, [N]
    kernel[(num_programs,)](
        x,
        peers.peer_buffer_ptrs,
        peers.buffer_indices,
        residual,
        weight,
        out,
        peers.max_rows,
        *num_rows,
        eps,
        int(has_residual),
        num_warps=num_warps,
        # At least two programs of any width fit on a multiprocessor. With one, rows beyond the
        # 132nd waited for others to end: on four GPUs 185 rows of 8B took 18.3 us, 128 rows 11.9.
        maxnreg=min(255, 1024 // num_warps),
        **sizes,
        **launch,
    )
    return out


class AllReduceRMSNorm(RMSNorm):
    """RMSNorm whose input is one partial sum for each rank.

    With peer memory, all-reduce, residual addition and norm are one kernel. Otherwise the layer
    runs an all-reduce, which is the identity on one rank, and then the norm.

    Shapes:
        x [N, E], this rank's partial sum
        the normed sum [N, E], equal on every rank
        the residual [N, E], valid only as input of the next norm of the same N tokens: see
            `kept_rows` and, for a micro-batch with a copy stream, `overlapped_all_reduce_norm`
    """

    def __init__(self, spec: NormSpec, context: LayerContext) -> None:
        super().__init__(spec, context)
        self.tp = context.tp

    def forward(
        self, x: Tensor, residual: Tensor | None = None, copy_stream: CopyStream | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (normed, residual); the residual now holds the sum that was normed."""
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
