from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpllm.layers.activation import silu_and_mul, silu_and_mul_reference, silu_and_mul_triton

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Where = tuple[torch.device, torch.dtype]


def random_input(num_rows: int, size: int, where: Where) -> Tensor:
    device, dtype = where
    rng = torch.Generator().manual_seed(num_rows * 10_000 + size)
    return (3 * torch.randn(num_rows, 2 * size, generator=rng)).to(device, dtype)


@pytest.mark.parametrize("num_rows, size", [(1, 1), (1, 8), (7, 100), (3, 1024), (2, 1025)])
@pytest.mark.parametrize("apply", [silu_and_mul_triton, silu_and_mul_reference, silu_and_mul])
def test_silu_and_mul_is_as_accurate_as_plain_torch(
    apply: Callable[[Tensor], Tensor],
    num_rows: int,
    size: int,
    device_and_dtype: Where,
    assert_as_accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    x = random_input(num_rows, size, device_and_dtype)
    gate, up = x.chunk(2, dim=-1)
    assert_as_accurate(apply(x), F.silu(gate) * up, F.silu(gate.double()) * up.double())


def test_silu_and_mul_reads_strided_rows(device: torch.device) -> None:
    x = random_input(6, 50, (device, torch.float32))[::2, 10:80]
    torch.testing.assert_close(silu_and_mul_triton(x), silu_and_mul_reference(x))


def test_no_rows_give_no_rows(device: torch.device) -> None:
    assert silu_and_mul_triton(torch.ones(0, 12, device=device)).shape == (0, 6)
