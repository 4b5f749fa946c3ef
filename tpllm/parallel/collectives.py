"""Collectives of the tensor-parallel group, in one place so that their algorithm can change.

Every rank of `tp` calls the same function in the same order with the same shapes and dtypes. With
`tp.size == 1` each one is the identity. `all_reduce`, `all_gather` and `all_to_all` only enqueue
work on the current stream and can be captured in a CUDA graph; `min_over_ranks` and `barrier` wait
for every rank on the host and belong to start-up.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tpllm.parallel.copy_streams import CopyStreamMemory, make_copy_streams
from tpllm.parallel.group import TPGroup
from tpllm.parallel.peer_memory import WIDTH_MULTIPLE, PeerMemory, clear_peer_buffers

# Room for the rows of a sender, in bytes: enough programs of a sum at the same time to fill a link.
_MAILBOX_BYTES = 4 << 20
# Largest sum, in bytes, of which every rank sends all to all others. On two ranks that is no more
# than they would send in two shots; on four, two shots are faster from some 256 KiB on.
_ONE_SHOT_BYTES = 256 << 10

Made = TypeVar("Made")

# torch 2.13 renamed the gather into one tensor and warns of the old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: Tensor, tp: TPGroup) -> Tensor:
    """Sum the contiguous x over the ranks, in place, and return x."""
    if tp.size > 1:
        dist.all_reduce(x, group=tp.process_group)
    return x


def all_gather(x: Tensor, tp: TPGroup) -> Tensor:
    """Stack the ranks' x in rank order: [tp.size, *x.shape], equal on every rank."""
    if tp.size == 1:
        return x.unsqueeze(0)
    out = x.new_empty(tp.size, *x.shape)
    # Flat views: a gathered tensor of one more dimension is not taken by every backend.
    _all_gather_single(out.view(-1), x.reshape(-1), group=tp.process_group)
    return out


def all_to_all(x: Tensor, tp: TPGroup) -> Tensor:
    """Give x[r] to rank r: x [tp.size, ...] contiguous; the result's [r] is what rank r gave us."""
    if tp.size == 1:
        return x
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=tp.process_group)
    return out


def min_over_ranks(value: int, tp: TPGroup) -> int:
    """Smallest `value` of any rank, as every rank needs it: free memory, for one."""
    if tp.size == 1:
        return value
    smallest = torch.tensor(value, dtype=torch.int64, device=tp.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=tp.process_group)
    return int(smallest.item())


def barrier(tp: TPGroup) -> None:
    """Return once every rank has come here."""
    # A reduction whose result is read waits the host on both backends; NCCL's own barrier only
    # makes the stream wait.
    min_over_ranks(0, tp)


def with_peer_memory(tp: TPGroup, width: int, dtype: torch.dtype) -> TPGroup:
    """The same group with `peers`, for sums of rows of `width`, if the GPUs reach each other.

    Every rank calls this together, and all get the same answer. A `width` that is no multiple of
    WIDTH_MULTIPLE is left to NCCL.
    """
    if tp.process_group is None or tp.device.type != "cuda" or width % WIDTH_MULTIPLE:
        return tp
    others = (rank for rank in range(tp.size) if rank != tp.rank)
    reachable = all(torch.cuda.can_device_access_peer(tp.device, other) for other in others)
    if not min_over_ranks(int(reachable), tp):
        return tp
    row_bytes = width * dtype.itemsize
    max_rows = max(2, _MAILBOX_BYTES // row_bytes)
    one_shot_rows = max_rows if tp.size == 2 else max(1, _ONE_SHOT_BYTES // row_bytes)
    peer_buffers = _made_by_all(
        tp, lambda: clear_peer_buffers(tp.size, max_rows, width, dtype, tp.device), "NCCL serves"
    )
    if peer_buffers is None:
        return tp
    group = tp.process_group
    peers = _made_by_all(tp, lambda: PeerMemory(group, peer_buffers, one_shot_rows), "NCCL serves")
    return replace(tp, peers=peers)


def with_copy_streams(tp: TPGroup, max_rows: int) -> TPGroup:
    """The same group with `copy_streams`, for sums of up to `max_rows` of the peer buffers' rows in each.

    Every rank of a group with peer memory calls this together, and all get the same answer.
    """
    group, peers, instead = tp.process_group, tp.peers, "no step is halved"
    assert group is not None
    assert peers is not None
    memory = _made_by_all(
        tp,
        lambda: CopyStreamMemory(tp.size, max_rows, peers.width, peers.dtype, tp.device),
        instead,
    )
    if memory is None:
        return tp
    return replace(
        tp, copy_streams=_made_by_all(tp, lambda: make_copy_streams(group, memory), instead) or ()
    )


def _made_by_all(tp: TPGroup, make: Callable[[], Made], instead: str) -> Made | None:
    """What `make` returns, or None on every rank where it raises RuntimeError or OSError on one.

    What waits for the peers must not begin where a rank may already have failed.
    """
    made = None
    try:
        made = make()
    except (RuntimeError, OSError) as error:  # a container that forbids to share descriptors
        print(f"tpllm: no peer memory on rank {tp.rank}, {instead}: {error}", file=sys.stderr)
    return made if min_over_ranks(int(made is not None), tp) else None
