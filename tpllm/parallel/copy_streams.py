"""Copy streams: they carry all-reduces on the GPUs' copy engines, beside the compute stream.

A large step runs as two micro-batches, block by block in turn. While the all-reduce of one
micro-batch runs in its copy stream, the other micro-batch computes. Copy engines move the bytes,
and the stream waits for flags in memory without a kernel. A kernel that sends and waits would not
fit beside a matmul, which takes all registers of a multiprocessor.

Both micro-batches compute on one stream, in the same order on every rank. With a stream each they
would share the multiprocessors and then wait for their all-reduces at the same time.

An all-reduce takes two exchanges. First each rank sends its partial sums to the ranks that own the
rows, and each rank reduces its share. Then each rank sends its outputs to all. After the rows, a
sender writes the round's number into a flag of the receiver, and the receiver's stream waits for
that flag. No rank overwrites data that is still being read:

- A rank sends the partial sums of a round after it has received all outputs of the round before.
  At that point every rank has reduced the partial sums of that earlier round.
- A rank sends outputs after it has received all partial sums of this round. A peer sends these
  only after it has used the outputs of the round before.

Source: CUDA Driver API, "Stream Memory Operations".
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
    """The all-reduces of one micro-batch. Every rank makes the same calls in the same order.

    An all-reduce has N rows of width E; this rank reduces the rows `share(N)`.
    """

    def computing(self) -> AbstractContextManager[None]:
        """Enclose the launches, on the current stream, that compute the next all-reduce's input."""
        ...

    def exchanging(self) -> AbstractContextManager[None]:
        """Launch the enclosed work on the copy stream, after the last `computing` block only.

        Later launches on the current stream wait for the enclosed work.
        """
        ...

    def share(self, num_rows: int) -> slice:
        """Return the rows that this rank reduces. With few rows, some ranks have none."""
        ...

    def exchange_partial_sums(self, x: Tensor) -> Tensor:
        """Send each rank its share of x [N, E]; return the ranks' partial sums of our share.

        Returns:
            [size, n, E], by sender. This rank's own entry and rows past its share are undefined.
        """
        ...

    def outputs(self, num_rows: int) -> Tensor:
        """Return the output buffer [N, E]; write this rank's share before `exchange_outputs`."""
        ...

    def exchange_outputs(self, num_rows: int) -> None:
        """Send our share of `outputs` to all ranks, and receive theirs."""
        ...


def share_of(num_rows: int, rank: int, size: int) -> slice:
    """Return the band of rows that a rank reduces."""
    rows = -(-num_rows // size)
    return slice(min(rank * rows, num_rows), min((rank + 1) * rows, num_rows))


class CopyStreamMemory:
    """One rank's buffers and flags for its copy streams, in memory that its peers can map.

    Args:
        size: number of ranks
        max_rows: largest number of rows of an all-reduce

    Raises:
        RuntimeError, OSError: there is no such memory, too little of it, or the driver has no
            stream memory operations.
    """

    def __init__(
        self, size: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        max_share = -(-max_rows // size)  # rows of a share
        shape = (NUM_COPY_STREAMS, size * max_share + max_rows, width)
        self.rows = symmetric_memory.empty(*shape, dtype=dtype, device=device)
        self.partial_sums = self.rows[:, :-max_rows].unflatten(1, (size, max_share))
        self.outputs = self.rows[:, -max_rows:]
        # [copy_stream, exchange, sender]
        flags = symmetric_memory.empty(NUM_COPY_STREAMS, 2, size, dtype=torch.int32, device=device)
        self.flags = flags.zero_()
        to_itself = [(operation, self.flags.data_ptr()) for operation in (_WRITE, _WAIT)]
        _run(_memory_operations(to_itself), torch.cuda.Stream(device).cuda_stream)
        torch.cuda.synchronize()


def make_copy_streams(
    group: dist.ProcessGroup, memory: CopyStreamMemory
) -> tuple["CopyEngineStream", ...]:
    """Return the copy streams of this rank.

    Every rank calls this at the same time, after all ranks have allocated their memory.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """
    handles = [symmetric_memory.rendezvous(each, group) for each in (memory.rows, memory.flags)]
    return tuple(
        CopyEngineStream(group.rank(), memory, handles, copy_stream)
        for copy_stream in range(NUM_COPY_STREAMS)
    )


class CopyEngineStream:
    """A `CopyStream` that uses the copy engines of GPUs.

    Args:
        rank: this rank
        memory: this rank's buffers and flags
        handles: symmetric-memory handles of the rows and of the flags; they own the mappings of
            the peers' memory
        index: index of this copy stream in `memory`
    """

    def __init__(self, rank: int, memory: CopyStreamMemory, handles: list[Any], index: int) -> None:
        self._partial_sums: Tensor = memory.partial_sums[index]  # [size, max_share, width]
        self._outputs: Tensor = memory.outputs[index]  # [max_rows, width]
        self._rank, self._size = rank, len(self._partial_sums)
        self._owners = (memory, handles)
        # each rank starts with a different peer
        self._peers = [(rank + i) % self._size for i in range(1, self._size)]
        # high priority: its short kernels run before the waiting tiles of matmuls
        self._stream = torch.cuda.Stream(memory.rows.device, priority=-1)
        self._computed = torch.cuda.Event()
        self._round = 0
        self._row_bytes = self._outputs[0].nbytes
        # addresses, on each rank, of the buffers for our partial sums and for the outputs
        first = memory.rows[:index].nbytes
        own_offset, outputs_offset = self._partial_sums[:rank].nbytes, self._partial_sums.nbytes
        self._partial_sums_at = [ptr + first + own_offset for ptr in handles[0].buffer_ptrs]
        self._outputs_at = [ptr + first + outputs_offset for ptr in handles[0].buffer_ptrs]
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

    def outputs(self, num_rows: int) -> Tensor:
        return self._outputs[:num_rows]

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
        """Set our flag on all peers, and make the stream wait for their flags."""
        signals = self._signals[exchange]
        for signal in signals:
            signal.value = self._round & 0xFFFFFFFF  # it may wrap: the comparison is cyclic
        _run(signals, self._stream.cuda_stream)

    def _signals_of(self, exchange: int, flags_at: list[int]) -> "_MemoryOperations":
        def flag(owner: int, sender: int) -> int:
            return flags_at[owner] + _FLAG_BYTES * (exchange * self._size + sender)

        writes = [(_WRITE, flag(peer, self._rank)) for peer in self._peers]
        waits = [(_WAIT, flag(self._rank, peer)) for peer in self._peers]
        return _memory_operations(writes + waits)


# ---- the CUDA driver -------------------------------------------------------------------------


class _MemoryOperation(ctypes.Structure):
    """The driver's CUstreamBatchMemOpParams.

    With flags of 0, a wait ends at the value or above, and a write follows all earlier work.
    """

    _fields_ = (
        ("operation", c_uint32),
        ("address", c_uint64),
        ("value", c_uint64),
        ("flags", c_uint32),
        ("alias", c_uint64),
        ("reserved", c_uint64),
    )


_MemoryOperations = ctypes.Array[_MemoryOperation]


def _memory_operations(kinds_and_addresses: list[tuple[int, int]]) -> _MemoryOperations:
    """Make operations from pairs of kind and address; their values are set later."""
    operations = (_MemoryOperation * len(kinds_and_addresses))()
    for operation, (kind, address) in zip(operations, kinds_and_addresses, strict=True):
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
        raise RuntimeError(f"the CUDA driver returned status {status}")
