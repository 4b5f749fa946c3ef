"""Linear layers split over the TP group, by output features (column) or input features (row).

A block of the model is a column-parallel layer, an elementwise or per-head operation, and a
row-parallel layer: one all-reduce per block. "Column" and "row" refer to Y = X A. Weights are
stored transposed, [out_features, in_features], so a column-parallel shard is a band of weight rows.

Source: Megatron-LM (2019), section 3, https://arxiv.org/abs/1909.08053
"""

from collections.abc import Sequence

from torch import Tensor, nn

from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.weight_format import Activation
from tpllm.layers.weights import WeightSource, fill, shard
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup


class _ColumnParallel(nn.Module):
    """One weight made of several bands, each read from some rows of its own checkpoint tensor.

    It follows a norm: `y, residual = linear(x, norm=norm, residual=residual)`.
    """

    def __init__(
        self,
        in_features: int,
        bands: list[slice],
        context: LayerContext,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self.bands = bands
        local_out = sum(rows.stop - rows.start for rows in bands)
        self.weight = context.weight_format(local_out, in_features, context)
        self.bias = context.parameter(local_out) if bias else None

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
            x: [N, in_features], with a norm this rank's partial sum of the norm's input
            residual: [N, in_features]; None at the first norm. It must not be used afterwards
            activation: joins the halves of the output, such as `silu_and_mul`
            copy_stream: carries the norm's all-reduce, if this is a micro-batch
        """
        if norm is not None and norm.tp.size > 1:  # its all-reduce is a kernel of its own
            x, residual = norm(x, residual, copy_stream)
            norm = None
        return self.weight.project(
            x, norm=norm, residual=residual, activation=activation, bias=self.bias
        )

    def load(self, weights: WeightSource, names: Sequence[str]) -> None:
        """Read the layers that are joined; `names` is in the order of the output."""
        first = 0
        for name, rows in zip(names, self.bands, strict=True):
            target = slice(first, first := first + rows.stop - rows.start)
            self.weight.load(weights, name, target, rows=rows)
            if self.bias is not None:
                fill(self.bias[target], weights.read(f"{name}.bias", rows=rows), f"{name}.bias")


class MergedColumnParallelLinear(_ColumnParallel):
    """Column-parallel layers over the same input, computed as one matmul (gate and up).

    Rank r holds the r-th of `tp.size` equal bands of each layer's weight rows and computes that
    slice of the output from the whole input, so the forward needs no communication. Follow it with
    `RowParallelLinear`, which takes the slice in and joins the ranks with one all-reduce.

    Shapes, with `out_features` the sizes of the layers:
        input [N, in_features], equal on every rank
        output [N, sum(out_features) / tp.size]: this rank's slice of each layer's output, side by
            side
        weight [sum(out_features) / tp.size, in_features]

    Raises:
        ValueError: `tp.size` does not divide the size of a layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: list[int],
        context: LayerContext,
    ) -> None:
        bands = [shard(size, context.tp, "out_features") for size in out_features]
        super().__init__(in_features, bands, context, bias=False)


class QKVParallelLinear(_ColumnParallel):
    """Query, key and value projections as one matmul, split by whole heads.

    Rank r holds the r-th band of query heads and the KV heads that they attend to. If there are
    fewer KV heads than ranks, `tp.size / num_kv_heads` neighbouring ranks hold the same KV head,
    and their caches hold the same keys and values.

    Shapes, with h and k the local head counts (`local_num_heads`, `local_num_kv_heads`):
        input [N, hidden_size], equal on every rank
        output [N, (h + 2 * k) * head_dim]: queries, keys, values
        weight [(h + 2 * k) * head_dim, hidden_size]

    Raises:
        ValueError: `tp.size` does not divide `num_heads`, or neither of `tp.size` and
            `num_kv_heads` divides the other.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        context: LayerContext,
        *,
        bias: bool = False,
    ) -> None:
        heads = shard(num_heads, context.tp, "num_attention_heads")
        kv_heads = kv_head_shard(num_kv_heads, context.tp)
        query_rows, kv_rows = _rows(heads, head_dim), _rows(kv_heads, head_dim)
        bands = [query_rows, kv_rows, kv_rows]
        super().__init__(hidden_size, bands, context, bias=bias)
        self.local_num_heads = heads.stop - heads.start
        self.local_num_kv_heads = kv_heads.stop - kv_heads.start


def kv_head_shard(num_kv_heads: int, tp: TPGroup) -> slice:
    """Return the KV heads of this rank: its band, or one head that it shares with its neighbours.

    Raises:
        ValueError: neither of `tp.size` and `num_kv_heads` divides the other.
    """
    if num_kv_heads >= tp.size:
        return shard(num_kv_heads, tp, "num_key_value_heads")
    if tp.size % num_kv_heads:
        # The query heads of some rank would attend to two KV heads.
        raise ValueError(
            f"a TP group of {tp.size} ranks is no multiple of num_key_value_heads={num_kv_heads}"
        )
    head = tp.rank * num_kv_heads // tp.size
    return slice(head, head + 1)


def _rows(heads: slice, head_dim: int) -> slice:
    """Return the weight rows of a range of heads."""
    return slice(heads.start * head_dim, heads.stop * head_dim)


class RowParallelLinear(nn.Module):
    """Linear layer whose input features are split across the TP group; it gives partial sums.

    Rank r holds the r-th of `tp.size` equal bands of weight columns and takes the slice of the
    input that a column-parallel layer left there. The `AllReduceRMSNorm` that follows adds the
    ranks' partial sums.

    Shapes:
        input [N, in_features / tp.size], this rank's slice
        output [N, out_features], this rank's partial sum
        weight [out_features, in_features / tp.size], this rank's shard

    Raises:
        ValueError: `tp.size` does not divide `in_features`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        context: LayerContext,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        tp = context.tp
        self.cols = shard(in_features, tp, "in_features")
        self.weight = context.weight_format(out_features, in_features // tp.size, context)
        # Only rank 0 adds the bias. If every rank did, the all-reduce would add it tp.size times.
        has_bias = bias and tp.rank == 0
        self.bias = context.parameter(out_features) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.project(x, bias=self.bias)[0]

    def load(self, weights: WeightSource, name: str) -> None:
        self.weight.load(weights, name, slice(None), cols=self.cols)
        if self.bias is not None:
            fill(self.bias, weights.read(f"{name}.bias"), f"{name}.bias")
