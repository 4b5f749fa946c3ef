"""All-reduce, residual addition and RMSNorm in a copy_stream: the sums of prompts, sent by copy engines.

N tokens, E hidden_size. As in `all_reduce_norm` each rank adds up a share of the rows, in rank
order, norms it and sends the result to all; it keeps the residual stream of its share alone. But no
kernel sends or waits: see `tpllm.parallel.copy_streams`.

Roofline: 2 * (size - 1) / size * N * E elements go over the link at 395 GB/s, beside products; the
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
    terms_ptr: tl.tensor,  # [SIZE, at least n, E], those of the others
    residual_ptr: tl.tensor,  # [n, E]
    weight_ptr: tl.tensor,  # [E]
    out_ptr: tl.tensor,  # [n, E]
    terms_stride: tl.tensor,
    eps: tl.tensor,
    has_residual: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """One program: one row."""
    cols = tl.arange(0, BLOCK)
    mask = cols < E
    offsets = tl.program_id(0).to(tl.int64) * E + cols
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for peer in tl.static_range(SIZE):
        term_ptrs = x_ptr + offsets
        if peer != RANK:
            term_ptrs = terms_ptr + terms_stride.to(tl.int64) * peer + offsets
        total += tl.load(term_ptrs, mask=mask, other=0.0).to(tl.float32)
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
    """Add up all ranks' x in the copy stream, and norm the result.

    Args:
        x: [N, E] contiguous, this rank's partial sum
        residual: this rank's `copy_stream.share(N)` of the stream, to which the sum is added in place, as
            the copy stream's last sum has left it; None at the first norm
        weight: [E]

    Returns:
        The normalised sum [N, E], which the copy stream's next one overwrites, and the residual [n, E].
    """
    assert x.is_contiguous()
    N = len(x)
    ours, out = copy_stream.share(N), copy_stream.sums(N)
    with copy_stream.exchanging():
        terms = copy_stream.exchange_partial_sums(x)
        residual = reduce_and_norm(x[ours], terms, residual, weight, out[ours], eps, tp)
        copy_stream.exchange_outputs(N)
    return out, residual


def reduce_and_norm(
    x: Tensor,
    terms: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
    tp: TPGroup,
) -> Tensor:
    """Norm the sum of this rank's x [n, E], the others' terms [size, >= n, E] and the residual.

    `out` [n, E] gets the result; returned is the sum [n, E], which is the residual's memory if
    there is one.
    """
    num_rows, E = x.shape
    has_residual = int(residual is not None)
    if residual is None:
        residual = torch.empty_like(x)
    block = triton.next_power_of_2(E)
    if num_rows:
        _reduce_and_norm_kernel[(num_rows,)](
            x,
            terms,
            residual,
            weight,
            out,
            terms.stride(0),
            eps,
            has_residual,
            E=E,
            BLOCK=block,
            RANK=tp.rank,
            SIZE=tp.size,
            num_warps=row_warps(block),
        )
    return residual
