"""Linear layers split over the TP group, by output features (column) or input features (row).

A block of the model is a column-parallel layer, an elementwise or per-head operation, and a
row-parallel layer: one all-reduce per block. "Column" and "row" refer to Y = X A. Weights are
stored transposed, [out_features, in_features], so a column-parallel shard is a band of weight rows.

Source: Megatron-LM (2019), section 3, https://arxiv.org/abs/1909.08053
"""

from torch import Tensor

from tpllm.architectures.spec import LinearSpec
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.weight_format import Activation
from tpllm.layers.weights import Layer, WeightSource, fill
from tpllm.parallel.copy_streams import CopyStream


class Linear(Layer):
    """One layer of a checkpoint, or several over the same input, computed as one matmul.

    The spec says how each of its weights is divided:

    - Column-parallel: a rank holds some weight rows, such as those of its heads, and computes that
      slice of the output from the whole input. This needs no communication.
    - Row-parallel: a rank holds some weight columns, takes the slice of the input that a
      column-parallel layer left there, and computes a partial sum of the output. The
      `AllReduceRMSNorm` at the beginning of the next block adds the ranks' partial sums.

    If there are fewer KV heads than ranks, neighbouring ranks hold the same KV head, and their
    caches hold the same keys and values.

    Shapes, with the sizes of `spec.local_shape(tp.size)`:
        input [N, in_features]
        output [N, out_features], the joined layers' slices side by side
        weight [out_features, in_features]

    Raises:
        ValueError: the group cannot divide a weight.
    """

    def __init__(self, spec: LinearSpec, context: LayerContext) -> None:
        super().__init__()
        self.spec, self.tp = spec, context.tp
        for weight in spec.weights:
            conflict = weight.sharding and weight.sharding.conflict(self.tp.size)
            if conflict:
                raise ValueError(f"{weight.name}: a TP group of {self.tp.size} ranks {conflict}")
        out_features, in_features = spec.local_shape(self.tp.size)
        self.weight = context.weight_format(out_features, in_features, context)
        self._project = self.weight.project
        self.bias = context.parameter(out_features) if spec.has_bias(self.tp.rank) else None

    def forward(
        self,
        x: Tensor,
        *,
        norm: AllReduceRMSNorm | None = None,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        copy_stream: CopyStream | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `activation(linear(norm(x + residual)))` and the residual stream.

        Args:
            x: [N, in_features]; with a norm, this rank's partial sum of the norm's input
            residual: [N, in_features]; None at the first norm. It must not be used afterwards.
                Without a norm it is returned as it is
            activation: joins the halves of the output, such as `silu_and_mul`
            copy_stream: carries the norm's all-reduce, if this is a micro-batch
        """
        if norm is not None and self.tp.size > 1:  # its all-reduce is a kernel of its own
            x, residual = norm(x, residual, copy_stream)
            norm = None
        return self._project(x, norm=norm, residual=residual, activation=activation, bias=self.bias)

    __call__ = forward  # without torch's hooks, which take the host 1 us a call

    def load(self, weights: WeightSource) -> None:
        rank, size = self.tp.rank, self.tp.size
        first = 0
        for i, weight in enumerate(self.spec.weights):
            target = slice(first, first := first + weight.local_shape(size)[0])
            self.weight.load(weights, weight.name, target, *weight.shard(rank, size))
            if self.bias is not None:
                bias = self.spec.biases[i]
                fill(self.bias[target], weights.read(bias.name, *bias.shard(rank, size)), bias.name)
