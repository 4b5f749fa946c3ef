"""Peer buffers for CPU processes: all-reduces over peer memory in Triton's interpreter."""

import math
import shutil
import tempfile
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from tests.gpu_instructions import interpret_gpu_instructions
from tpllm.parallel.collectives import barrier
from tpllm.parallel.group import TPGroup
from tpllm.parallel.peer_memory import EMPTY, NUM_BUFFERS, PeerBuffers


@dataclass
class SharedPeerBuffers(PeerBuffers):
    owned: tuple[torch.Tensor, ...]


def with_shared_peer_buffers(tp: TPGroup, max_rows: int, one_shot_rows: int, E: int) -> TPGroup:
    """Return the group with peer buffers for rows of E float32, in a file that all ranks map."""
    interpret_gpu_instructions()
    shape = (tp.size, NUM_BUFFERS, tp.size, max_rows, E)
    path = [tempfile.mkdtemp() if tp.rank == 0 else None]
    dist.broadcast_object_list(path, 0, group=tp.process_group)
    memory = torch.from_file(f"{path[0]}/peer_buffers", shared=True, size=math.prod(shape))
    peer_buffers = memory.view(shape)
    peer_buffers[tp.rank].fill_(EMPTY)
    pointers = torch.tensor([each.data_ptr() for each in peer_buffers])
    barrier(tp)
    if tp.rank == 0:
        shutil.rmtree(str(path[0]))
    buffer_indices = torch.zeros(max_rows, dtype=torch.int32)
    peers = SharedPeerBuffers(
        pointers.data_ptr(),
        buffer_indices,
        max_rows,
        one_shot_rows,
        E,
        torch.float32,
        (memory, pointers),
    )
    return replace(tp, peers=peers)
