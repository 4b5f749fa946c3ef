"""RMSNorm fused with the residual addition: one kernel, one pass over memory.

N tokens, E hidden_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.architectures.spec import NormSpec
from tpllm.layers.context import LayerContext
from tpllm.layers.weights import Layer, WeightSource, fill


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """Compute `rms_norm_triton` in plain torch."""
    if residual is not None:
        residual += x
        x = residual
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


@triton.jit
def add_and_norm(
    x: tl.tensor,  # [BLOCK] fp32
    residual: tl.tensor,  # [BLOCK] fp32
    weight: tl.tensor,  # [BLOCK]
    dtype: tl.constexpr,
    eps: tl.tensor,
    E: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the sum of x and the residual, in `dtype`, and its norm, in fp32, for one row."""
    # the norm's input is the sum as it is stored, rounded, as in transformers
    total = (x + residual).to(dtype)
    x = total.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x) / E + eps)).to(dtype).to(tl.float32)
    return total, normed * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,  # [N, E]
    residual_ptr: tl.tensor,  # [N, E], read and written if HAS_RESIDUAL
    weight_ptr: tl.tensor,  # [E]
    out_ptr: tl.tensor,  # [N, E]
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2**31 in long batches
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < E
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    residual_ptrs = residual_ptr + row * residual_stride + cols
    residual = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    total, normed = add_and_norm(x, residual, weight, x_ptr.dtype.element_ty, eps, E)
    if HAS_RESIDUAL:
        tl.store(residual_ptrs, total, mask=mask)
    tl.store(out_ptr + row * out_stride + cols, normed, mask=mask)


def row_warps(block: int) -> int:
    """Return the number of warps for a row: a thread has 8 half-precision elements (16 bytes)."""
    return min(max(block // 256, 1), 16)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """Normalise each row of x to a root mean square of 1, then scale its columns by `weight`.

    With a residual, first `residual += x` in place; that sum is then normalised. The mean is
    computed in fp32. The sum and the normalised row are rounded to x's dtype, as in transformers.

    Shapes: x, residual, result [N, E], last dimension contiguous; weight [E]; one dtype for all.
    """
    N, E = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(E)
    _rms_norm_kernel[(N,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        E=E,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=row_warps(block),
    )
    return out


class RMSNorm(Layer):
    """Root-mean-square norm over the hidden size, after the residual addition.

    The residual stream is written in place: `x, residual = norm(x, residual)` leaves the running
    sum in `residual` and its normalised form in `x`. The first norm of a model has no residual and
    returns its input as the residual stream, so that input must not be used elsewhere.

    Shapes:
        x, residual and both results [N, E], in the layer's dtype
        weight [E], the same on every rank

    Source: Zhang and Sennrich (2019), https://arxiv.org/abs/1910.07467
    """

    def __init__(self, spec: NormSpec, context: LayerContext) -> None:
        super().__init__()
        self.spec, self.eps = spec.weight, spec.eps
        self.weight = context.parameter(*spec.weight.shape)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (normed, residual); the residual now holds the sum that was normed."""
        rms_norm = rms_norm_triton if x.is_cuda else rms_norm_reference
        normed = rms_norm(x, self.weight, self.eps, residual)
        return normed, x if residual is None else residual

    def load(self, weights: WeightSource) -> None:
        fill(self.weight, weights.read(self.spec.name), self.spec.name)
