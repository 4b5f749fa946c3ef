"""How the ranks divide weights."""

import pytest

from tpllm.architectures.spec import LinearSpec, Sharding, WeightSpec


def held(weight: WeightSpec, size: int) -> list[list[int]]:
    """Return the rows or columns of each rank."""
    assert weight.sharding is not None
    dim = weight.sharding.dim
    bands = [weight.shard(rank, size) for rank in range(size)]
    assert all(band[1 - dim] is None for band in bands)
    return [list(range(weight.shape[dim]))[band[dim] or slice(None)] for band in bands]


@pytest.mark.parametrize("dim", [0, 1])
def test_heads_are_divided_whole_by_rows_or_columns(dim) -> None:
    weight = WeightSpec("q", (12, 12), Sharding(dim, 4, "num_attention_heads"))
    assert held(weight, 2) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert held(weight, 4)[1] == [3, 4, 5]
    assert weight.local_shape(4) == ((3, 12) if dim == 0 else (12, 3))


def test_with_more_ranks_than_kv_heads_neighbours_hold_the_same() -> None:
    weight = WeightSpec("k", (4, 8), Sharding(0, 2, "num_key_value_heads", uneven="repeat"))
    assert held(weight, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert weight.local_shape(4) == (2, 8)
    assert held(weight, 1) == [[0, 1, 2, 3]]


def test_the_last_ranks_hold_less_of_an_uneven_vocabulary() -> None:
    weight = WeightSpec("embed", (10, 8), Sharding(0, 10, "vocab_size", uneven="pad"))
    assert held(weight, 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert weight.local_shape(4) == (3, 8)
    assert held(weight, 8)[-3:] == [[], [], []]


def test_joined_weights_are_one_matmul() -> None:
    heads, kv_heads = Sharding(0, 4, "H"), Sharding(0, 1, "K", uneven="repeat")
    weights = [WeightSpec(each, (8, 5), heads) for each in "q"]
    weights += [WeightSpec(each, (2, 5), kv_heads) for each in "kv"]
    assert LinearSpec("qkv", tuple(weights)).local_shape(2) == (4 + 2 + 2, 5)


def test_a_whole_weight_is_on_every_rank() -> None:
    weight = WeightSpec("norm", (8,))
    assert weight.shard(1, 2) == (None, None)
    assert weight.local_shape(2) == (8,)
