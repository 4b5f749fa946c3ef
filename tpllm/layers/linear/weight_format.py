"""The weight of a linear layer: how it is stored, how it is loaded, and what multiplies with it.

A storage format is one subclass of `LinearWeight`. Layers make their weights by
`LayerContext.weight_format`, and know nothing of formats and of kernels that fuse more than a
matmul. N out_features and K in_features of this rank, M tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from tpllm.layers.activation import silu_and_mul
from tpllm.layers.weights import WeightSource, fill

if TYPE_CHECKING:  # both take a `LayerContext`, which has a format
    from tpllm.layers.context import LayerContext
    from tpllm.layers.norm import RMSNorm

Activation = Callable[[Tensor], Tensor]


class LinearWeight(nn.Module):
    """A weight [N, K] in some format.

    A subclass has parameters, `load` and `matmul`. It overrides `project` where it has a kernel
    that fuses more.
    """

    def __init__(self, out_features: int, in_features: int, context: "LayerContext") -> None:
        super().__init__()

    def load(
        self,
        weights: WeightSource,
        name: str,
        target: slice,
        rows: slice | None,
        cols: slice | None,
    ) -> None:
        """Fill this weight's rows `target` with `rows` and `cols` of the checkpoint's `name`.

        Raises:
            ValueError: the checkpoint's tensor has another shape.
        """
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias` [M, N] of x [M, K] and bias [N]."""
        raise NotImplementedError

    def project(
        self,
        x: Tensor,
        *,
        norm: "RMSNorm | None" = None,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `activation(matmul(norm(x + residual), bias))` and the residual stream.

        With a norm, that is the norm's input, x + residual [M, K], and `residual` must not be used
        afterwards. Without a norm, the residual is returned as it is, and not added.
        """
        if norm is not None:
            x, residual = norm(x, residual)
        y = self.matmul(x, bias)
        return (y if activation is None else activation(y)), residual


class DenseWeight(LinearWeight):
    """A weight in the dtype of the activations: `values` [N, K].

    A single row takes one kernel with everything around it, if the context's matmul has one. Other
    rows take the context's matmul, and torch's where there is a bias.
    """

    def __init__(self, out_features: int, in_features: int, context: "LayerContext") -> None:
        super().__init__(out_features, in_features, context)
        self.values = context.parameter(out_features, in_features)
        self._matmul = context.matmul

    def load(
        self,
        weights: WeightSource,
        name: str,
        target: slice,
        rows: slice | None,
        cols: slice | None,
    ) -> None:
        fill(self.values[target], weights.read(name, rows, cols), name)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return self._matmul(x, self.values)
        return F.linear(x, self.values, bias)

    def project(
        self,
        x: Tensor,
        *,
        norm: "RMSNorm | None" = None,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        gemv = self._matmul.gemv
        fusible = x.shape[0] == 1 and activation in (None, silu_and_mul)
        if gemv is None or not fusible:
            return super().project(
                x, norm=norm, residual=residual, activation=activation, bias=bias
            )
        swiglu = activation is not None
        if norm is None:
            return gemv(x, self.values, bias=bias, swiglu=swiglu)[0], residual
        around = (norm.weight, norm.eps)
        return gemv(x, self.values, norm=around, residual=residual, bias=bias, swiglu=swiglu)
