"""Matrix times vector, with the norm before it and the activation after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpllm.layers.linear.gemv import gemv_reference, gemv_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-6


def random(*shape: int, device, dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def plain(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    swiglu: bool,
) -> Tensor:
    """Compute the separate steps in x's dtype, the reference for the result's error."""
    total = x if residual is None else x + residual
    if norm is not None:
        x = F.rms_norm(total, total.shape[-1:], norm, EPS)
    y = F.linear(x, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y


@pytest.mark.parametrize("N, K", [(1, 8), (13, 100), (64, 1030), (6, 4104)])
@pytest.mark.parametrize(
    "with_norm, with_residual, swiglu",
    [(False, False, False), (False, False, True), (True, False, False), (True, True, True)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("apply", [gemv_triton, gemv_reference])
def test_is_as_accurate_as_separate_steps(
    apply, N, K, with_bias, with_norm, with_residual, swiglu, device_and_dtype, assert_as_accurate
) -> None:
    device, dtype = device_and_dtype
    x = random(1, K, device=device, dtype=dtype)
    weight = random((1 + swiglu) * N, K, device=device, dtype=dtype) / K**0.5
    scales = random(K, device=device, dtype=dtype, seed=1) if with_norm else None
    residual = random(1, K, device=device, dtype=dtype, seed=2) if with_residual else None
    bias = random((1 + swiglu) * N, device=device, dtype=dtype, seed=3) if with_bias else None
    norm = None if scales is None else (scales, EPS)
    y, total = apply(x, weight, norm=norm, residual=residual, bias=bias, swiglu=swiglu)
    # the norm's input is the sum as it is stored, rounded
    stored = x if residual is None else x + random(1, K, device=device, dtype=dtype, seed=2)
    exact_scales = None if scales is None else scales.double()
    exact_bias = None if bias is None else bias.double()
    exact = plain(stored.double(), weight.double(), exact_scales, None, exact_bias, swiglu)
    assert_as_accurate(y, plain(x, weight, scales, residual, bias, swiglu), exact)
    assert torch.equal(total, stored)
