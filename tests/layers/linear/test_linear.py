"""Sharded linear layers against the dense layers of the same checkpoint tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    kv_head_shard,
)
from tpllm.parallel.collectives import all_gather, all_reduce
from tpllm.parallel.group import TPGroup

DTYPE = torch.float32
CPU = torch.device("cpu")


class TensorWeights:
    """A `WeightSource` of tensors in memory; it counts the elements that were read."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name.replace("__", "."): torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        self.num_read = 0

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        tensor = self.tensors[name][rows or slice(None)]
        tensor = tensor if cols is None else tensor[:, cols]
        self.num_read += tensor.numel()
        return tensor


def inputs(num_tokens: int, features: int) -> Tensor:
    return torch.randn(num_tokens, features, generator=torch.Generator().manual_seed(1))


def dense(weights: TensorWeights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights.tensors[f"{name}.weight"], weights.tensors.get(f"{name}.bias"))


def single(rank: int, size: int) -> TPGroup:
    """Return one rank of a group without its peers, for layers that do not communicate."""
    return TPGroup(rank=rank, size=size, device=CPU, process_group=None)


def column_then_row_equals_dense(tp: TPGroup) -> None:
    for bias in [False, True]:
        biases = {"down__bias": (5,)} if bias else {}
        weights = TensorWeights(up__weight=(12, 7), down__weight=(5, 12), **biases)
        up = MergedColumnParallelLinear(7, [12], LayerContext(tp, DTYPE))
        down = RowParallelLinear(12, 5, LayerContext(tp, DTYPE), bias=bias)
        up.load(weights, ["up"])
        down.load(weights, "down")
        whole = 12 * 7 + 5 * 12
        assert weights.num_read == whole // tp.size + (bias and tp.rank == 0) * 5
        for num_tokens in [1, 9]:
            x = inputs(num_tokens, 7)
            hidden, _ = up(x)
            joined = torch.cat([*all_gather(hidden, tp)], dim=-1)
            torch.testing.assert_close(joined, dense(weights, "up", x))
            torch.testing.assert_close(
                all_reduce(down(hidden), tp),
                dense(weights, "down", dense(weights, "up", x)),
                rtol=1e-5,
                atol=1e-4,
            )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_column_then_row_equals_dense(world_size: int) -> None:
    run_ranks(column_then_row_equals_dense, world_size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_layer_puts_the_shards_of_its_parts_side_by_side(size: int) -> None:
    weights = TensorWeights(gate__weight=(8, 6), up__weight=(4, 6))
    x = inputs(3, 6)
    for rank in range(size):
        layer = MergedColumnParallelLinear(6, [8, 4], LayerContext(single(rank, size), DTYPE))
        layer.load(weights, ["gate", "up"])
        expected = [dense(weights, name, x).chunk(size, dim=-1)[rank] for name in ["gate", "up"]]
        torch.testing.assert_close(layer(x)[0], torch.cat(expected, dim=-1))


@pytest.mark.parametrize(
    "heads, kv_heads, size",
    [(4, 2, 1), (4, 2, 2), (4, 2, 4), (8, 1, 4), (6, 3, 3), (4, 4, 2)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_qkv_layer_holds_whole_heads_and_the_kv_heads_they_use(
    heads: int, kv_heads: int, size: int, bias: bool
) -> None:
    head_dim, hidden_size, num_tokens = 3, 10, 5
    shapes: dict[str, tuple[int, ...]] = {}
    for name, count in [("q", heads), ("k", kv_heads), ("v", kv_heads)]:
        shapes[f"{name}__weight"] = (count * head_dim, hidden_size)
        if bias:
            shapes[f"{name}__bias"] = (count * head_dim,)
    weights = TensorWeights(**shapes)
    x = inputs(num_tokens, hidden_size)
    q, k, v = (dense(weights, name, x).view(num_tokens, -1, head_dim) for name in "qkv")
    for rank in range(size):
        layer = QKVParallelLinear(
            hidden_size,
            heads,
            kv_heads,
            head_dim,
            LayerContext(single(rank, size), DTYPE),
            bias=bias,
        )
        layer.load(weights, ["q", "k", "v"])
        my_heads = range(rank * heads // size, (rank + 1) * heads // size)
        my_kv_heads = sorted({head * kv_heads // heads for head in my_heads})
        assert layer.local_num_heads == len(my_heads)
        assert layer.local_num_kv_heads == len(my_kv_heads)
        expected = torch.cat([q[:, my_heads], k[:, my_kv_heads], v[:, my_kv_heads]], dim=1)
        torch.testing.assert_close(layer(x)[0], expected.flatten(1))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks does not divide out_features=8"):
        MergedColumnParallelLinear(4, [8], LayerContext(single(0, 3), DTYPE))
    with pytest.raises(ValueError, match="3 ranks does not divide in_features=8"):
        RowParallelLinear(8, 4, LayerContext(single(0, 3), DTYPE))
    with pytest.raises(ValueError, match="3 ranks does not divide num_attention_heads=4"):
        QKVParallelLinear(4, 4, 2, 8, LayerContext(single(0, 3), DTYPE))
    with pytest.raises(ValueError, match="3 ranks is no multiple of num_key_value_heads=2"):
        kv_head_shard(2, single(0, 3))
    with pytest.raises(ValueError, match="2 ranks does not divide num_key_value_heads=3"):
        kv_head_shard(3, single(0, 2))


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    layer = MergedColumnParallelLinear(4, [8], LayerContext(single(0, 1), DTYPE))
    weights = TensorWeights(up__weight=(8, 1))  # copying alone would broadcast it
    with pytest.raises(
        ValueError, match=r"up.weight has shape \[8, 1\], but the model needs \[8, 4\]"
    ):
        layer.load(weights, ["up"])


def test_loading_converts_to_the_dtype_of_the_layer() -> None:
    weights = TensorWeights(up__weight=(8, 4))
    layer = MergedColumnParallelLinear(4, [8], LayerContext(single(0, 1), torch.bfloat16))
    layer.load(weights, ["up"])
    assert torch.equal(next(layer.weight.parameters()), weights.tensors["up.weight"].bfloat16())
