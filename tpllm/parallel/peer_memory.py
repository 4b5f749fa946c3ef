"""Memory of every rank that every other rank can write directly, over NVLink.

Each rank has a peer buffer from every other one. A kernel puts rows into those of its peers and then
looks into its own until the peers' rows are there: no signal is needed, because an empty peer buffer
holds nothing but `EMPTY`, which no row contains. Whoever takes a row leaves `EMPTY` behind.

Each row of a peer buffer has two places, used in turn. A rank that runs ahead can so leave a row while
the one before is still being read, and it cannot get further: to finish that next exchange it needs
the row that the slower rank sends after it has read and emptied the first place. That holds also
for two ranks that exchange nothing in a round of a sum in two shots: whoever adds up a row takes a
term of everybody and answers everybody.

Source: the flag-free protocol that NVIDIA's TensorRT-LLM calls Lamport-style, after Lamport (1977),
"Concurrent Reading and Writing", https://doi.org/10.1145/359863.359878
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

EMPTY = -0.0  # a sum loses nothing where a zero changes its sign
NUM_PLACES = 2
WIDTH_MULTIPLE = 8  # of a row's elements, so that they travel 16 bytes at a time


@dataclass
class PeerBuffers:
    """PeerBuffers for rows of `width` on every rank, as a rank's kernels see them.

    Attributes:
        peer_buffer_ptrs: address of an array with the address of each rank's peer buffers, in rank order;
            those of a rank are [NUM_PLACES, size, max_rows, width], by place and sender
        places: [max_rows] int32, where each row goes next, 0 <= place < NUM_PLACES
        one_shot_rows: of up to so many rows every rank sends all to all others
    """

    peer_buffer_ptrs: int
    places: Tensor
    max_rows: int
    one_shot_rows: int
    width: int
    dtype: torch.dtype


def clear_peer_buffers(
    size: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for a rank's peer buffers, which its peers can map: [NUM_PLACES, size, max_rows, width].

    Raises:
        RuntimeError: there is no such memory, or not enough.
    """
    shape = (NUM_PLACES, size, max_rows, width)
    return symmetric_memory.empty(*shape, dtype=dtype, device=device).fill_(EMPTY)


class PeerMemory(PeerBuffers):
    """PeerBuffers in the memory of the GPUs of a group.

    Every rank makes them, with the same arguments and empty peer buffers of its own, at the same time.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, peer_buffers: Tensor, one_shot_rows: int) -> None:
        max_rows, width = peer_buffers.shape[2:]
        places = torch.zeros(max_rows, dtype=torch.int32, device=peer_buffers.device)
        # the handle owns the mappings of the peers' memory, and keeps ours
        self._handle = symmetric_memory.rendezvous(peer_buffers, group)
        self._peer_buffers = peer_buffers
        ptrs: int = self._handle.buffer_ptrs_dev
        super().__init__(ptrs, places, max_rows, one_shot_rows, width, peer_buffers.dtype)
        torch.cuda.synchronize()
        dist.barrier(group)  # nobody sends before all peer buffers are empty
