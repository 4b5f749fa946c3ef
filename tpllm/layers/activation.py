"""SwiGLU, `silu(gate) * up`, fp32 inside, one pass over memory.

N tokens, I intermediate_size (this rank's share of it). Source: Shazeer (2020), "GLU Variants
Improve Transformer", https://arxiv.org/abs/2002.05202
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns a program


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """Compute `silu_and_mul_triton` in plain torch."""
    gate, up = x.float().chunk(2, dim=-1)  # [N, I] each
    return (F.silu(gate) * up).to(x.dtype)


@triton.jit
def _silu_and_mul_kernel(
    x_ptr: tl.tensor,  # [N, 2 * I]
    out_ptr: tl.tensor,  # [N, I]
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    I: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2**31 in long batches
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < I
    gate = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + I + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, gate * tl.sigmoid(gate) * up, mask=mask)


def silu_and_mul_triton(x: Tensor) -> Tensor:
    """Launch the kernel on x [N, 2 * I], last dimension contiguous, and return [N, I]."""
    N, I = x.shape[0], x.shape[1] // 2
    out = x.new_empty(N, I)
    grid = (N, triton.cdiv(I, _BLOCK))
    _silu_and_mul_kernel[grid](x, out, x.stride(0), out.stride(0), I, BLOCK=_BLOCK)
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    """Return `silu(gate) * up` [N, I] of x [N, 2 * I], whose rows are gate | up."""
    return silu_and_mul_triton(x) if x.is_cuda else silu_and_mul_reference(x)
