"""Lanes in which sums over the ranks travel while the multiprocessors compute something else.

A step of many prompt tokens runs in two halves, block by block in turn: while the sum of one half
is on its way, in that half's copy stream, the other half computes. What a sum sends over the links is
carried by the GPUs' copy engines, and the copy stream's stream waits for it without any kernel: one that
sends and waits would find no room beside a product, which takes all registers of a multiprocessor.

The halves compute on one stream, in an order that is the same everywhere. On a stream for each they
would run into step, share the multiprocessors, and then wait for their sums at the same time.

A sum takes two exchanges. Each rank adds up a share of the rows, for which the others send it their
terms; then it sends the sums to all. Behind the rows a sender writes the number of the round into a
flag of the receiver, for which the receiver's stream waits. Nobody overwrites what is still read:

- terms of a round are sent by whoever has had all sums of the round before, for which everybody had
  added up the terms of that round;
- sums are sent by whoever has all terms of this round, and a rank sends those after it has used the
  sums of the round before.

Streams that wait for values in memory: CUDA Driver API, "Stream Memory Operations".
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

NUM_COPY_STREAMS = 2
_PARTIAL_SUMS, _OUTPUTS = 0, 1  # the exchanges of a round
_FLAG_BYTES = 4
_WAIT, _WRITE = 1, 2  # CUstreamBatchMemOpType, for values of 32 bits


class CopyStream(Protocol):
    """What a half of a step needs; the halves' copy streams go through the same calls on every rank.

    N rows of width E, of which each rank adds up `share(N)`.
    """

    def computing(self) -> AbstractContextManager[None]:
        """Inside, what the copy stream's next sum is of is launched on the current stream."""
        ...

    def exchanging(self) -> AbstractContextManager[None]:
        """What is launched inside follows the last `computing`, and nothing launched since.

        What is launched on the current stream afterwards follows it.
        """
        ...

    def share(self, num_rows: int) -> slice:
        """The rows that this rank adds up; of few rows some ranks have none."""
        ...

    def exchange_partial_sums(self, x: Tensor) -> Tensor:
        """Of x [N, E] give each rank its share: [size, n, E], what each rank gave of ours.

        Our own term is not among them. What is behind our share is undefined.
        """
        ...

    def sums(self, num_rows: int) -> Tensor:
        """[N, E], where this rank's share is to be written before `exchange_outputs`."""
        ...

    def exchange_outputs(self, num_rows: int) -> None:
        """Give our share of `sums` to all ranks, and get theirs."""
        ...


def share_of(num_rows: int, rank: int, size: int) -> slice:
    """The rows that a rank adds up, one band for each."""
    rows = -(-num_rows // size)
    return slice(min(rank * rows, num_rows), min((rank + 1) * rows, num_rows))


class CopyStreamMemory:
    """What a rank gives for the copy_streams: room for rows, and flags, which its peers can map.

    Args:
        size: number of ranks
        max_rows: most rows of a sum

    Raises:
        RuntimeError, OSError: there is no such memory, not enough, or no stream waits for it.
    """

    def __init__(
        self, size: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        most = -(-max_rows // size)  # rows of a share
        shape = (NUM_COPY_STREAMS, size * most + max_rows, width)
        self.rows = symmetric_memory.empty(*shape, dtype=dtype, device=device)
        self.terms = self.rows[:, :-max_rows].unflatten(1, (size, most))
        self.sums = self.rows[:, -max_rows:]
        # [copy_stream, exchange, sender]
        flags = symmetric_memory.empty(NUM_COPY_STREAMS, 2, size, dtype=torch.int32, device=device)
        self.flags = flags.zero_()
        to_itself = [(operation, self.flags.data_ptr()) for operation in (_WRITE, _WAIT)]
        _run(_memory_operations(to_itself), torch.cuda.Stream(device).cuda_stream)
        torch.cuda.synchronize()


def make_copy_streams(
    group: dist.ProcessGroup, memory: CopyStreamMemory
) -> tuple["CopyEngineStream", ...]:
    """Lanes between the GPUs of a group.

    Every rank makes them at the same time, when all have their memory.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """
    handles = [symmetric_memory.rendezvous(each, group) for each in (memory.rows, memory.flags)]
    return tuple(
        CopyEngineStream(group.rank(), memory, handles, copy_stream)
        for copy_stream in range(NUM_COPY_STREAMS)
    )


class CopyEngineStream:
    """A copy stream between GPUs.

    Args:
        rank: this one
        memory: of this rank
        handles: of everybody's rows and flags; they own the mappings of the peers' memory
        index: which copy stream it is
    """

    def __init__(self, rank: int, memory: CopyStreamMemory, handles: list[Any], index: int) -> None:
        self._partial_sums: Tensor = memory.terms[index]  # [size, most rows of a share, width]
        self._sums: Tensor = memory.sums[index]  # [max_rows, width]
        self._rank, self._size = rank, len(self._partial_sums)
        self._owners = (memory, handles)
        # each rank begins with another
        self._peers = [(rank + i) % self._size for i in range(1, self._size)]
        # its short kernels go before the tiles of products that are waiting, too
        self._stream = torch.cuda.Stream(memory.rows.device, priority=-1)
        self._computed = torch.cuda.Event()
        self._round = 0
        self._row_bytes = self._sums[0].nbytes
        # where each rank has room for our terms, and for all sums
        first = memory.rows[:index].nbytes
        ours, behind = self._partial_sums[:rank].nbytes, self._partial_sums.nbytes
        self._partial_sums_at = [ptr + first + ours for ptr in handles[0].buffer_ptrs]
        self._outputs_at = [ptr + first + behind for ptr in handles[0].buffer_ptrs]
        flags_at = [ptr + memory.flags[:index].nbytes for ptr in handles[1].buffer_ptrs]
        self._signals = [
            self._signals_of(exchange, flags_at) for exchange in (_PARTIAL_SUMS, _OUTPUTS)
        ]

    @contextmanager
    def computing(self) -> Iterator[None]:
        yield
        self._computed.record()

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_event(self._computed)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def share(self, num_rows: int) -> slice:
        return share_of(num_rows, self._rank, self._size)

    def exchange_partial_sums(self, x: Tensor) -> Tensor:
        self._round += 1
        for peer in self._peers:
            theirs = share_of(len(x), peer, self._size)
            source = x.data_ptr() + theirs.start * self._row_bytes
            self._copy(self._partial_sums_at[peer], source, theirs.stop - theirs.start)
        self._signal(_PARTIAL_SUMS)
        return self._partial_sums

    def sums(self, num_rows: int) -> Tensor:
        return self._sums[:num_rows]

    def exchange_outputs(self, num_rows: int) -> None:
        ours = self.share(num_rows)
        offset = ours.start * self._row_bytes
        for peer in self._peers:
            source = self._outputs_at[self._rank] + offset
            self._copy(self._outputs_at[peer] + offset, source, ours.stop - ours.start)
        self._signal(_OUTPUTS)

    def _copy(self, target: int, source: int, num_rows: int) -> None:
        if num_rows:
            num_bytes = num_rows * self._row_bytes
            stream = self._stream.cuda_stream
            _check(_driver().cuMemcpyDtoDAsync_v2(target, source, num_bytes, stream))

    def _signal(self, exchange: int) -> None:
        """Tell all peers that our rows are there, and wait for theirs."""
        signals = self._signals[exchange]
        for each in signals:
            each.value = self._round & 0xFFFFFFFF  # it may wrap: the comparison is a cyclic one
        _run(signals, self._stream.cuda_stream)

    def _signals_of(self, exchange: int, flags_at: list[int]) -> "_MemoryOperations":
        def flag(owner: int, sender: int) -> int:
            return flags_at[owner] + _FLAG_BYTES * (exchange * self._size + sender)

        told = [(_WRITE, flag(peer, self._rank)) for peer in self._peers]
        awaited = [(_WAIT, flag(self._rank, peer)) for peer in self._peers]
        return _memory_operations(told + awaited)


# ---- the driver ------------------------------------------------------------------------------


class _MemoryOperation(ctypes.Structure):
    """CUstreamBatchMemOpParams. Flags of 0: wait for the value or more; write behind all before."""

    _fields_ = (
        ("operation", c_uint32),
        ("address", c_uint64),
        ("value", c_uint64),
        ("flags", c_uint32),
        ("alias", c_uint64),
        ("reserved", c_uint64),
    )


_MemoryOperations = ctypes.Array[_MemoryOperation]


def _memory_operations(each: list[tuple[int, int]]) -> _MemoryOperations:
    """From kinds and addresses."""
    operations = (_MemoryOperation * len(each))()
    for operation, (kind, address) in zip(operations, each, strict=True):
        operation.operation, operation.address = kind, address
    return operations


def _run(operations: _MemoryOperations, stream: int) -> None:
    _check(_driver().cuStreamBatchMemOp_v2(stream, len(operations), operations, 0))


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyDtoDAsync_v2.argtypes = [c_uint64, c_uint64, c_size_t, c_void_p]
    driver.cuStreamBatchMemOp_v2.argtypes = [c_void_p, c_uint32, c_void_p, c_uint32]
    return driver


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA's driver answered with status {status}")
