"""Copy streams' addresses of copies and flags, with a fake driver and peers in this process."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpllm.parallel import copy_streams as copy_streams
from tpllm.parallel.copy_streams import CopyEngineStream, CopyStreamMemory, share_of

CPU, MAX_ROWS, WIDTH = torch.device("cpu"), 10, 8


class Driver:
    """Does at once what a stream would do, and does not wait."""

    def cuMemcpyDtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> int:
        ctypes.memmove(target, source, size)
        return 0

    def cuStreamBatchMemOp_v2(self, stream: int, count: int, operations: Any, flags: int) -> int:
        assert len(operations) == count
        for each in operations:
            if each.operation == copy_streams._WRITE:
                ctypes.c_uint32.from_address(each.address).value = each.value
        return 0


@pytest.fixture
def ranks(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> list[list[CopyEngineStream]]:
    """The copy streams of each rank; the test's parameter is the number of ranks."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, 7, dtype=dtype)

    monkeypatch.setattr(copy_streams, "_driver", Driver)
    monkeypatch.setattr(copy_streams, "symmetric_memory", SimpleNamespace(empty=empty))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    size: int = request.param
    memories = [CopyStreamMemory(size, MAX_ROWS, WIDTH, torch.float32, CPU) for _ in range(size)]
    handles = [
        SimpleNamespace(buffer_ptrs=[getattr(memory, name).data_ptr() for memory in memories])
        for name in ("rows", "flags")
    ]
    return [
        [
            CopyEngineStream(rank, memories[rank], handles, copy_stream)
            for copy_stream in range(copy_streams.NUM_COPY_STREAMS)
        ]
        for rank in range(size)
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4], indirect=True)
def test_partial_sums_and_outputs_arrive_at_the_right_address(
    ranks: list[list[CopyEngineStream]],
) -> None:
    values = torch.Generator().manual_seed(0)
    for num_rows in (MAX_ROWS, 7, 2, 1):
        for index in range(copy_streams.NUM_COPY_STREAMS):
            all_ranks = [each[index] for each in ranks]
            xs = [torch.randn(num_rows, WIDTH, generator=values) for _ in ranks]
            partial_sums = [
                copy_stream.exchange_partial_sums(x)
                for copy_stream, x in zip(all_ranks, xs, strict=True)
            ]
            for rank, copy_stream in enumerate(all_ranks):
                ours = copy_stream.share(num_rows)
                theirs = [
                    xs[peer][ours]
                    if peer == rank
                    else partial_sums[rank][peer, : ours.stop - ours.start]
                    for peer in range(len(ranks))
                ]
                copy_stream.outputs(num_rows)[ours] = sum(theirs)
            for copy_stream in all_ranks:
                copy_stream.exchange_outputs(num_rows)
            for copy_stream in all_ranks:
                torch.testing.assert_close(copy_stream.outputs(num_rows), sum(xs))


@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_every_peer_has_a_flag_for_each_exchange(ranks: list[list[CopyEngineStream]]) -> None:
    def flags(rank: int) -> list[list[list[int]]]:
        memory, _ = ranks[rank][0]._owners
        found: list[list[list[int]]] = memory.flags.tolist()
        return found

    assert flags(1) == [[[0, 0, 0]] * 2] * 2
    ranks[0][1].exchange_partial_sums(torch.zeros(MAX_ROWS, WIDTH))
    assert flags(1) == flags(2) == [[[0, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]]
    ranks[2][1]._round = 5
    ranks[2][1].exchange_outputs(MAX_ROWS)
    assert flags(1) == [[[0, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 5]]]
    assert flags(2)[1] == [[1, 0, 0], [0, 0, 0]]


def test_an_error_of_the_driver_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(cuStreamBatchMemOp_v2=lambda *_: 801)
    monkeypatch.setattr(copy_streams, "_driver", lambda: refusing)
    with pytest.raises(RuntimeError, match="801"):
        copy_streams._run(copy_streams._memory_operations([(copy_streams._WRITE, 0)]), 0)


@pytest.mark.parametrize("num_rows, size", [(0, 2), (1, 2), (2, 3), (7, 4), (8, 4), (4, 3)])
def test_shares_are_all_rows_in_order(num_rows: int, size: int) -> None:
    rows = [row for rank in range(size) for row in range(num_rows)[share_of(num_rows, rank, size)]]
    assert rows == list(range(num_rows))
