"""One row takes another kernel than many rows, with the same result."""

import pytest
import torch

from tests.ranks import run_ranks
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import MergedColumnParallelLinear
from tpllm.layers.linear.norm_linear import norm_linear
from tpllm.parallel.group import TPGroup


def one_row_is_that_row_of_many(tp: TPGroup) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = AllReduceRMSNorm(32, 1e-6, LayerContext(tp, torch.float32))
    linear = MergedColumnParallelLinear(32, [16, 16], LayerContext(tp, torch.float32))
    norm.weight.copy_(torch.rand(32, generator=generator))
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
    x = torch.randn(3, 32, generator=generator)
    stream = torch.randn(3, 32, generator=generator)
    for swiglu in (False, True):
        for residual in (None, stream):
            several, stream_of_all = norm_linear(
                norm, linear, x.clone(), clone(residual), swiglu=swiglu
            )
            for row in range(3):
                one_residual = None if residual is None else residual[row : row + 1].clone()
                one, total = norm_linear(
                    norm, linear, x[row : row + 1].clone(), one_residual, swiglu=swiglu
                )
                torch.testing.assert_close(one[0], several[row])
                torch.testing.assert_close(total[0], stream_of_all[row])


def clone(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.clone()


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_row_is_that_row_of_many(world_size: int) -> None:
    run_ranks(one_row_is_that_row_of_many, world_size)
