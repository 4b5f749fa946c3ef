"""All-reduce, residual addition and RMSNorm in a copy stream, for micro-batches of large steps.

N tokens, E hidden_size. As in `all_reduce_norm`, each rank reduces its share of the rows in rank
order, norms them and sends the result to all; it keeps the residual stream of its share only. Here
copy engines send and streams wait, instead of kernels: see `tpllm.parallel.copy_streams`.

Roofline: 2 * (size - 1) / size * N * E elements cross the link at 395 GB/s, beside matmuls. The
kernel between the two exchanges reads N * E and writes 2 / size * N * E elements at 4.3 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.layers.norm import add_and_norm, row_warps
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup


@triton.jit(do_not_specialize=["has_residual"])
def _reduce_and_norm_kernel(
    x_ptr: tl.tensor,  # [n, E], this rank's term of its share
    partial_sums_ptr: tl.tensor,  # [SIZE, at least n, E], by sender
    residual_ptr: tl.tensor,  # [n, E]
    weight_ptr: tl.tensor,  # [E]
    out_ptr: tl.tensor,  # [n, E]
    partial_sums_stride: tl.tensor,
    eps: tl.tensor,
    has_residual: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Reduce and norm one row in each program."""
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    offsets = tl.program_id(0).to(tl.int64) * E + cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        partial_sum_ptrs = x_ptr + offsets
        if peer != RANK:
            partial_sum_ptrs = partial_sums_ptr + partial_sums_stride.to(tl.int64) * peer + offsets
        total += tl.load(partial_sum_ptrs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=mask & (has_residual != 0), other=0.0)
    dtype = x_ptr.dtype.element_ty
    total, normed = add_and_norm(total, residual.to(tl.float32), weight, dtype, eps, E)
    tl.store(residual_ptr + offsets, total, mask=mask)
    tl.store(out_ptr + offsets, normed, mask=mask)


def overlapped_all_reduce_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    tp: TPGroup,
    copy_stream: CopyStream,
) -> tuple[Tensor, Tensor]:
    """All-reduce x in the copy stream, add the residual, and norm the result.

    Args:
        x: [N, E] contiguous, this rank's partial sum
        residual: the residual stream of the rows `copy_stream.share(N)`, as the last call with this
            copy stream returned it; overwritten by the new sum. None at the first norm
        weight: [E]

    Returns:
        The normed sum [N, E], which the next call with this copy stream overwrites, and the
        residual stream [n, E].
    """
    assert x.is_contiguous()
    N = len(x)
    ours, out = copy_stream.share(N), copy_stream.outputs(N)
    with copy_stream.exchanging():
        partial_sums = copy_stream.exchange_partial_sums(x)
        residual = reduce_and_norm(x[ours], partial_sums, residual, weight, out[ours], eps, tp)
        copy_stream.exchange_outputs(N)
    return out, residual


def reduce_and_norm(
    x: Tensor,
    partial_sums: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    tp: TPGroup,
) -> Tensor:
    """Reduce this rank's share of the rows, add the residual, and norm the result.

    Args:
        x: [n, E], this rank's partial sums
        partial_sums: [size, >= n, E], all ranks' partial sums; this rank's own entry is not read
        residual: [n, E], overwritten by the sum; None if there is none
        out: [n, E], receives the normed sum

    Returns:
        The sum [n, E], in the residual's memory if there is one.
    """
    num_rows, E = x.shape
    has_residual = int(residual is not None)
    if residual is None:
        residual = torch.empty_like(x)
    block = triton.next_power_of_2(E)
    if num_rows:
        _reduce_and_norm_kernel[(num_rows,)](
            x,
            partial_sums,
            residual,
            weight,
            out,
            partial_sums.stride(0),
            eps,
            has_residual,
            E=E,
            BLOCK=block,
            RANK=tp.rank,
            SIZE=tp.size,
            num_warps=row_warps(block),
        )
    return residual
