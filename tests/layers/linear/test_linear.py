"""Sharded linear layers against the dense layers of the same checkpoint tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from tpllm.architectures.decoder import linear
from tpllm.architectures.spec import LinearSpec, Sharding
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.linear import Linear
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


def column(in_features: int, **sizes: int) -> LinearSpec:
    """Return column-parallel layers over the same input, by the sizes of their outputs."""
    return linear(
        "joined",
        [
            (name, (size, in_features), Sharding(0, size, "out_features"))
            for name, size in sizes.items()
        ],
    )


def row(name: str, in_features: int, out_features: int, *, bias: bool = False) -> LinearSpec:
    sharding = Sharding(1, in_features, "in_features")
    return linear(name, [(name, (out_features, in_features), sharding)], bias=bias)


def qkv(heads: int, kv_heads: int, head_dim: int, in_features: int, bias: bool) -> LinearSpec:
    """Return query, key and value projections, split by whole heads."""
    queries = Sharding(0, heads, "num_attention_heads")
    keys = Sharding(0, kv_heads, "num_key_value_heads", uneven="repeat")
    return linear(
        "qkv",
        [
            ("q", (heads * head_dim, in_features), queries),
            ("k", (kv_heads * head_dim, in_features), keys),
            ("v", (kv_heads * head_dim, in_features), keys),
        ],
        bias=bias,
    )


def single(rank: int, size: int) -> TPGroup:
    """Return one rank of a group without its peers, for layers that do not communicate."""
    return TPGroup(rank=rank, size=size, device=CPU, process_group=None)


def column_then_row_equals_dense(tp: TPGroup) -> None:
    for bias in [False, True]:
        biases = {"down__bias": (5,)} if bias else {}
        weights = TensorWeights(up__weight=(12, 7), down__weight=(5, 12), **biases)
        up = Linear(column(7, up=12), LayerContext(tp, DTYPE))
        down = Linear(row("down", 12, 5, bias=bias), LayerContext(tp, DTYPE))
        up.load(weights)
        down.load(weights)
        whole = 12 * 7 + 5 * 12
        assert weights.num_read == whole // tp.size + (bias and tp.rank == 0) * 5
        for num_tokens in [1, 9]:
            x = inputs(num_tokens, 7)
            hidden, _ = up(x)
            joined = torch.cat([*all_gather(hidden, tp)], dim=-1)
            torch.testing.assert_close(joined, dense(weights, "up", x))
            torch.testing.assert_close(
                all_reduce(down(hidden)[0], tp),
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
        layer = Linear(column(6, gate=8, up=4), LayerContext(single(rank, size), DTYPE))
        layer.load(weights)
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
        layer = Linear(
            qkv(heads, kv_heads, head_dim, hidden_size, bias),
            LayerContext(single(rank, size), DTYPE),
        )
        layer.load(weights)
        my_heads = range(rank * heads // size, (rank + 1) * heads // size)
        my_kv_heads = sorted({head * kv_heads // heads for head in my_heads})
        expected = torch.cat([q[:, my_heads], k[:, my_kv_heads], v[:, my_kv_heads]], dim=1)
        torch.testing.assert_close(layer(x)[0], expected.flatten(1))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="up.weight: .* 3 ranks does not divide out_features=8"):
        Linear(column(4, up=8), LayerContext(single(0, 3), DTYPE))
    with pytest.raises(ValueError, match="3 ranks does not divide in_features=8"):
        Linear(row("down", 8, 4), LayerContext(single(0, 3), DTYPE))
    with pytest.raises(ValueError, match="3 ranks does not divide num_attention_heads=4"):
        Linear(qkv(4, 2, 8, 4, False), LayerContext(single(0, 3), DTYPE))
    uneven = "neither divides nor is a multiple of num_key_value_heads"
    with pytest.raises(ValueError, match=f"3 ranks {uneven}=2"):
        Linear(qkv(6, 2, 8, 4, False), LayerContext(single(0, 3), DTYPE))
    with pytest.raises(ValueError, match=f"2 ranks {uneven}=3"):
        Linear(qkv(6, 3, 8, 4, False), LayerContext(single(0, 2), DTYPE))


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    layer = Linear(column(4, up=8), LayerContext(single(0, 1), DTYPE))
    weights = TensorWeights(up__weight=(8, 1))  # copying alone would broadcast it
    with pytest.raises(
        ValueError, match=r"up.weight has shape \[8, 1\], but the model needs \[8, 4\]"
    ):
        layer.load(weights)


def test_loading_converts_to_the_dtype_of_the_layer() -> None:
    weights = TensorWeights(up__weight=(8, 4))
    layer = Linear(column(4, up=8), LayerContext(single(0, 1), torch.bfloat16))
    layer.load(weights)
    assert torch.equal(next(layer.weight.parameters()), weights.tensors["up.weight"].bfloat16())
