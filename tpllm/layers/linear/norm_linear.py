"""A norm, the column-parallel layer after it and its activation: the beginning of every block."""

from torch import Tensor

from tpllm.layers.activation import silu_and_mul
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.linear.gemv import FusedOps, gemv
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
    """Return `linear(norm(x + residual))` and the sum; on one rank, one row takes a single kernel.

    Args:
        x: [N, E], this rank's partial sum of the norm's input
        residual: [N, E]; None at the first norm. It must not be used afterwards
        copy_stream: carries the all-reduce, if this is a micro-batch
        swiglu: whether to apply `silu(gate) * up` to the halves of the output

    Returns:
        The output [N, out_features of this rank, halved by swiglu], and the residual stream [N, E].
    """
    one_row = x.shape[0] == 1 and linear.bias is None and linear.matmul.has_gemv
    if one_row and norm.tp.size == 1:
        fused = FusedOps((norm.weight, norm.eps), residual, swiglu)
        return gemv(x, linear.weight, fused=fused)
    x, residual = norm(x, residual, copy_stream)
    if one_row:
        return gemv(x, linear.weight, fused=FusedOps(swiglu=swiglu))[0], residual
    x = linear(x)
    return (silu_and_mul(x) if swiglu else x), residual
