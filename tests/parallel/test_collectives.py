"""Collectives over Gloo. Each rank contributes its own numbers, so that a missing rank shows."""

from unittest.mock import Mock

import pytest
import torch

from tests.ranks import run_ranks
from tpllm.parallel.collectives import (
    _make_on_all_ranks,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    min_over_ranks,
    with_peer_memory,
)
from tpllm.parallel.group import TPGroup

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def collectives_join_all_ranks(tp: TPGroup) -> None:
    ranks = torch.arange(tp.size)
    for dtype in DTYPES:  # [1, 1] and uneven shapes
        for shape in [(1, 1), (7, 100)]:
            x = torch.full(shape, tp.rank + 1, dtype=dtype)
            assert all_reduce(x, tp) is x
            assert torch.equal(x, torch.full(shape, int((ranks + 1).sum()), dtype=dtype))

    for dtype in [*DTYPES, torch.int32]:
        mine = (10 * tp.rank + torch.arange(6).view(3, 2)).to(dtype)
        expected = torch.stack([10 * rank + torch.arange(6).view(3, 2) for rank in ranks])
        assert torch.equal(all_gather(mine, tp), expected.to(dtype))
        gathered = all_gather(mine.T, tp)  # not contiguous
        assert torch.equal(gathered, expected.mT.to(dtype))

    # rank a sends 100 a + 10 b and up to rank b
    mine = 100 * tp.rank + 10 * ranks.view(-1, 1, 1) + torch.arange(6).view(3, 2)
    expected = 100 * ranks.view(-1, 1, 1) + 10 * tp.rank + torch.arange(6).view(3, 2)
    assert torch.equal(all_to_all(mine, tp), expected)

    large = 2**40  # bytes of memory do not fit in int32
    assert min_over_ranks(large - tp.rank, tp) == large - (tp.size - 1)
    barrier(tp)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collectives_join_all_ranks(world_size: int) -> None:
    run_ranks(collectives_join_all_ranks, world_size)


def test_a_group_of_one_needs_no_store() -> None:
    tp = TPGroup.connect(0, 1, torch.device("cpu"), "/nowhere/store", timeout_s=1)
    assert tp == TPGroup.single(torch.device("cpu"))
    tp.close()


def fails_on_last_rank(tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        raise ZeroDivisionError("only here")
    barrier(tp)


def test_run_ranks_raises_the_error_of_any_rank() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 raised\n(.*\n)*ZeroDivisionError: only here"):
        run_ranks(fails_on_last_rank, 2)


@pytest.mark.parametrize("one_host", [True, False])
def test_ranks_on_several_hosts_do_not_look_for_peer_memory(one_host, monkeypatch) -> None:
    def ask_peers(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
        raise LookupError

    monkeypatch.setattr("tpllm.parallel.collectives.all_gather", ask_peers)
    monkeypatch.setattr("torch.tensor", lambda value, device: None)
    tp = TPGroup(0, 2, torch.device("cuda", 0), Mock(), one_host=one_host)
    if one_host:
        with pytest.raises(LookupError):
            with_peer_memory(tp, 64, torch.float16)
    else:
        assert with_peer_memory(tp, 64, torch.float16) is tp


def no_rank_has_what_one_rank_cannot_make(tp: TPGroup) -> None:
    def make() -> str:
        if tp.rank == tp.size - 1:
            raise RuntimeError("no memory left")
        return "made"

    assert _make_on_all_ranks(tp, make, "tests go on") is None
    assert _make_on_all_ranks(tp, lambda: "made", "tests go on") == "made"


def test_no_rank_has_what_one_rank_cannot_make() -> None:
    """Otherwise the others would wait for that rank in the next collective."""
    run_ranks(no_rank_has_what_one_rank_cannot_make, 3)
