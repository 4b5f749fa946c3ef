"""A norm, the column-parallel layer behind it and its activation: how every block begins."""

from torch import Tensor

from tpllm.layers.activation import silu_and_mul
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.linear.gemv import Around, gemv
from tpllm.layers.linear.linear import MergedColumnParallelLinear, QKVParallelLinear
from tpllm.parallel.copy_streams import CopyStream


def norm_linear(
    norm: AllReduceRMSNorm,
    linear: QKVParallelLinear | MergedColumnParallelLinear,
    x: Tensor,
    residual: Tensor | None,
    copy_stream: CopyStream | None = None,
    *,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear(norm(x + residual))`, and the sum: one kernel for one row on one rank.

    Args:
        x: [N, E], this rank's term of what the norm adds up
        residual: [N, E]; None at the first norm. Not to be used afterwards
        copy_stream: where the sum runs, in a half of a step
        swiglu: whether `silu(gate) * up` of the output's halves is wanted

    Returns:
        The output [N, out_features of this rank, halved by swiglu], and the residual stream [N, E].
    """
    one_row = x.shape[0] == 1 and linear.bias is None and linear.matmul.has_gemv
    if one_row and norm.tp.size == 1:
        around = Around((norm.weight, norm.eps), residual, swiglu)
        return gemv(x, linear.weight, around=around)
    x, residual = norm(x, residual, copy_stream)
    if one_row:
        return gemv(x, linear.weight, around=Around(swiglu=swiglu))[0], residual
    x = linear(x)
    return (silu_and_mul(x) if swiglu else x), residual
