"""Matrix times vector: the linear layers of a step of one token, with norm and activation fused in.

N out_features, K in_features. Memory traffic bounds such a step, and further time is lost between
kernels. So one kernel computes the residual addition and RMSNorm before the matmul (a row's scale
is a factor of the whole sum and is applied at its end) and SwiGLU after it. It is launched early
(`dependent_launch`).

Roofline: the weight is read once, 2 * N * K bytes in half precision, at memory speed.
`docs/benchmark-log.md` has the measured times.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.layers.activation import silu_and_mul_reference
from tpllm.layers.dependent_launch import dependent_launch

_BLOCK_N = 8  # weight rows of a program; with SwiGLU 4 gate rows and 4 up rows
_BLOCK_K = 512  # columns of an iteration


def gemv_reference(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `gemv_triton` in plain torch."""
    total = x if residual is None else x + residual
    if norm is not None:
        norm_weight, eps = norm
        x = F.rms_norm(total.float(), total.shape[-1:], norm_weight.float(), eps).to(x.dtype)
    y = F.linear(x, weight, bias)
    return (silu_and_mul_reference(y) if swiglu else y), total


@triton.jit
def _gemv_kernel(
    x_ptr: tl.tensor,  # [K]
    residual_ptr: tl.tensor,  # [K]
    norm_weight_ptr: tl.tensor,  # [K]
    weight_ptr: tl.tensor,  # [N, K]; where SWIGLU [2 * N, K], gate and up
    bias_ptr: tl.tensor,  # [N] or [2 * N]
    out_ptr: tl.tensor,  # [N]
    total_ptr: tl.tensor,  # [K], x + residual
    N: tl.tensor,
    K: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Compute BLOCK_N elements of the result in each program; program 0 writes x + residual."""
    program = tl.program_id(0)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_n = (n < N)[:, None]
    row_ptrs = weight_ptr + n.to(tl.int64)[:, None] * K  # int64: N * K passes 2**31 in LM heads
    up_row_ptrs = row_ptrs + tl.cast(N, tl.int64) * K
    if PDL:
        gdc_wait()
    # Accumulated elementwise; the reduction across threads happens once, at the end.
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in tl.range(0, K, BLOCK_K, loop_unroll_factor=2):
        cols = first + k
        in_k = cols < K
        mask = in_n & in_k[None, :]
        weight = tl.load(row_ptrs + cols[None, :], mask=mask, other=0.0)
        if SWIGLU:
            up_weight = tl.load(up_row_ptrs + cols[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + cols, mask=in_k, other=0.0)
        x_fp32 = x.to(tl.float32)
        if HAS_NORM:
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + cols, mask=in_k, other=0.0)
                x = (x_fp32 + residual.to(tl.float32)).to(x.dtype)  # as it is stored
                x_fp32 = x.to(tl.float32)
                if program == 0:
                    tl.store(total_ptr + cols, x, mask=in_k)
            squares += x_fp32 * x_fp32
            norm_weight = tl.load(norm_weight_ptr + cols, mask=in_k, other=0.0)
            x_fp32 *= norm_weight.to(tl.float32)
        acc += weight.to(tl.float32) * x_fp32[None, :]
        if SWIGLU:
            up_acc += up_weight.to(tl.float32) * x_fp32[None, :]
    if PDL:
        # Not earlier: dependents would take this kernel's room on the multiprocessors, which costs
        # more than a launch.
        gdc_launch_dependents()
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    y = tl.sum(acc, axis=1) * scale  # [BLOCK_N]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.sum(up_acc, axis=1) * scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
        y = y * tl.sigmoid(y) * up
    tl.store(out_ptr + n, y, mask=n < N)


def gemv_triton(
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `weight @ x + bias` for a single row, fused with norm and activation.

    Args:
        x: [1, K] contiguous
        weight: [N, K] contiguous; with SwiGLU [2 * N, K], the gate's rows first
        norm: weight [K] and epsilon of the RMSNorm before the matmul; None for no norm
        residual: [1, K], only with `norm`: added to x before the norm, and not changed
        bias: as many elements as the weight has rows; added before the activation
        swiglu: whether the result is `silu(gate) * up` of the two halves of the output

    Returns:
        The result [1, N], and x with the residual added [1, K] (x itself without a residual).
    """
    assert residual is None or norm is not None
    norm_weight, eps = norm or (x, 0.0)
    K = x.shape[1]
    N = weight.shape[0] // 2 if swiglu else weight.shape[0]
    assert x.shape[0] == 1 and x.is_contiguous() and weight.is_contiguous()
    y = x.new_empty(1, N)
    total = x if residual is None else torch.empty_like(x)
    block_n = _BLOCK_N // 2 if swiglu else _BLOCK_N
    _gemv_kernel[(triton.cdiv(N, block_n),)](
        x,
        x if residual is None else residual,
        norm_weight,
        weight,
        weight if bias is None else bias,
        y,
        total,
        N,
        K,
        eps,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        SWIGLU=swiglu,
        BLOCK_N=block_n,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        **dependent_launch(x.device, 1),
    )
    return y, total
