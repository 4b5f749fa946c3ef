"""A linear layer behind a norm, for any format of its weight: a dense one, and a toy of 8 bits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.layers.linear.test_linear import TensorWeights, column
from tests.models.test_qwen3 import LENGTHS, make_model, run_steps
from tests.ranks import run_ranks
from tpllm.architectures.spec import NormSpec, WeightSpec
from tpllm.config.checkpoint import resolve_model
from tpllm.config.model_config import ModelConfig
from tpllm.layers.activation import silu_and_mul
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import Linear
from tpllm.layers.linear.matmul import fast_matmul
from tpllm.layers.linear.weight_format import LinearWeight
from tpllm.layers.weights import WeightSource
from tpllm.models.checkpoint_weights import SafetensorsWeights
from tpllm.parallel.group import TPGroup

GROUP = 8  # input features that share a scale


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [N, K] as integers [N, K / GROUP, GROUP] and scales [N, K / GROUP, 1]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return (groups / scales).round().to(torch.int8), scales


def rounded(weight: Tensor) -> Tensor:
    integers, scales = quantised(weight)
    return (integers * scales).flatten(1)


class Int8Weight(LinearWeight):
    """A weight of 8-bit integers, quantised as it is loaded."""

    def __init__(self, out_features: int, in_features: int, context: LayerContext) -> None:
        super().__init__(out_features, in_features, context)
        groups = in_features // GROUP
        self.integers = torch.nn.Parameter(
            torch.zeros(out_features, groups, GROUP, dtype=torch.int8), requires_grad=False
        )
        self.scales = context.parameter(out_features, groups, 1)

    def load(
        self,
        weights: WeightSource,
        name: str,
        target: slice,
        rows: slice | None,
        cols: slice | None,
    ) -> None:
        integers, scales = quantised(weights.read(name, rows, cols))
        self.integers[target], self.scales[target] = integers, scales

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, (self.integers * self.scales).flatten(1), bias)


def one_row_is_that_row_of_many(tp: TPGroup) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = LayerContext(tp, torch.float32)
    contexts = [
        plain,
        replace(plain, matmul=fast_matmul(torch.float32, tp.device)),
        replace(plain, weight_format=Int8Weight),
    ]
    weights = TensorWeights(gate__weight=(16 * tp.size, 32), up__weight=(16 * tp.size, 32))
    x = torch.randn(3, 32, generator=generator)
    stream = torch.randn(3, 32, generator=generator)
    for context in contexts:
        norm = AllReduceRMSNorm(NormSpec(WeightSpec("norm.weight", (32,)), 1e-6), context)
        norm.weight.copy_(torch.rand(32, generator=generator))
        linear = Linear(column(32, gate=16 * tp.size, up=16 * tp.size), context)
        linear.load(weights)
        for activation in (None, silu_and_mul):
            for residual in (None, stream):
                several, stream_of_all = linear(
                    x.clone(), norm=norm, residual=clone(residual), activation=activation
                )
                for row in range(3):
                    one_residual = None if residual is None else residual[row : row + 1].clone()
                    one, total = linear(
                        x[row : row + 1].clone(),
                        norm=norm,
                        residual=one_residual,
                        activation=activation,
                    )
                    torch.testing.assert_close(one[0], several[row])
                    assert total is not None and stream_of_all is not None
                    torch.testing.assert_close(total[0], stream_of_all[row])


def clone(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_row_is_that_row_of_many(world_size: int) -> None:
    run_ranks(one_row_is_that_row_of_many, world_size)


class RoundedWeights:
    """The weights of another source, those of the blocks' linear layers rounded to 8 bits."""

    def __init__(self, weights: WeightSource) -> None:
        self._weights = weights

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        tensor = self._weights.read(name, rows, cols)
        return rounded(tensor) if name.endswith("_proj.weight") else tensor


def a_model_in_8_bits_equals_one_of_rounded_weights(tp: TPGroup) -> None:
    config = ModelConfig.from_folder(resolve_model(None))
    weights = SafetensorsWeights(resolve_model(None))
    plain = LayerContext(tp, torch.float32)
    in_8_bits = make_model(config, replace(plain, weight_format=Int8Weight))
    in_8_bits.load(weights)
    assert sum(each.dtype == torch.int8 for each in in_8_bits.parameters()) == 4 * (
        config.num_hidden_layers
    )
    expected = make_model(config, plain)
    expected.load(RoundedWeights(weights))
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(config.vocab_size, (n,), generator=generator).int() for n in LENGTHS]
    for found, right in zip(
        run_steps(in_8_bits, sequences, tp), run_steps(expected, sequences, tp), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_in_8_bits_equals_one_of_rounded_weights(world_size: int) -> None:
    """A new format is one class: no layer, no model and no other file knows of it."""
    run_ranks(a_model_in_8_bits_equals_one_of_rounded_weights, world_size)
