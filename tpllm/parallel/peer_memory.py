"""Peer buffers: memory of each rank that the other ranks write directly, over NVLink.

Each rank has one peer buffer for every sender. A kernel writes rows into its peers' buffers and
then polls its own until the peers' rows have arrived. No flag is needed: an empty buffer holds
only `EMPTY`, which no row contains, and the reader of a row writes `EMPTY` back.

Each row is double-buffered. A fast rank can therefore send the next row while the row before is
still being read, but it cannot get further ahead: to finish that next exchange, it needs the row
that the slow rank sends after it has read and cleared the first buffer. This also holds for two
ranks that exchange no row in a round of a two-shot all-reduce, because the rank that reduces a row
receives a partial sum from every rank and sends the output to every rank.

Source: the flag-free protocol that NVIDIA's TensorRT-LLM calls Lamport-style, after Lamport (1977),
"Concurrent Reading and Writing", https://doi.org/10.1145/359863.359878
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

EMPTY = -0.0  # senders replace it by 0.0, which does not change a sum
NUM_BUFFERS = 2
WIDTH_MULTIPLE = 8  # a row's width is a multiple of it, so that stores are 16 bytes wide


@dataclass
class PeerBuffers:
    """The peer buffers of all ranks, as a rank's kernels see them.

    Attributes:
        peer_buffer_ptrs: address of an array with the address of each rank's peer buffers, in rank
            order; a rank's buffers are [NUM_BUFFERS, size, max_rows, width], the second dimension
            being the sender
        buffer_indices: [max_rows] int32, the buffer that each row uses next, below NUM_BUFFERS
        max_rows: rows of a peer buffer
        one_shot_rows: up to this many rows, an all-reduce is one-shot
        width: elements of a row
        dtype: dtype of the elements
    """

    peer_buffer_ptrs: int
    buffer_indices: Tensor
    max_rows: int
    one_shot_rows: int
    width: int
    dtype: torch.dtype


def clear_peer_buffers(
    size: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Allocate a rank's empty peer buffers in memory that its peers can map.

    Returns:
        [NUM_BUFFERS, size, max_rows, width], filled with EMPTY.

    Raises:
        RuntimeError: there is no such memory, or too little of it.
    """
    shape = (NUM_BUFFERS, size, max_rows, width)
    return symmetric_memory.empty(*shape, dtype=dtype, device=device).fill_(EMPTY)


class PeerMemory(PeerBuffers):
    """`PeerBuffers` in the memory of a group's GPUs.

    Every rank creates one at the same time, with arguments of the same shape and its own empty
    peer buffers.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, peer_buffers: Tensor, one_shot_rows: int) -> None:
        max_rows, width = peer_buffers.shape[2:]
        buffer_indices = torch.zeros(max_rows, dtype=torch.int32, device=peer_buffers.device)
        # the handle owns the mappings of the peers' memory and keeps ours alive
        self._handle = symmetric_memory.rendezvous(peer_buffers, group)
        self._peer_buffers = peer_buffers
        ptrs: int = self._handle.buffer_ptrs_dev
        super().__init__(ptrs, buffer_indices, max_rows, one_shot_rows, width, peer_buffers.dtype)
        torch.cuda.synchronize()
        dist.barrier(group)  # no rank sends before all peer buffers are empty
