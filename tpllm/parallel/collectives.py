"""Collectives of a group of ranks.

Every rank of `tp` calls the same function in the same order with the same shapes and dtypes. With
`tp.size == 1` each collective is the identity. `all_reduce`, `all_gather` and `all_to_all` only
enqueue work on the current stream and can be captured in a CUDA graph. `min_over_ranks` and
`barrier` block the host until every rank has called them, so they are used at start-up only.
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

# Size of a peer buffer in bytes: enough concurrent programs of an all-reduce to saturate a link.
_PEER_BUFFER_BYTES = 4 << 20
# Largest one-shot all-reduce in bytes. On two ranks, one-shot sends no more bytes than two-shot. On
# four ranks, two-shot is faster from about 256 KiB on.
_ONE_SHOT_BYTES = 256 << 10

T = TypeVar("T")

# torch 2.13 renamed `all_gather_into_tensor` and deprecated the old name.
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
    # Flat views: some backends refuse an output with one more dimension than the input.
    _all_gather_single(out.view(-1), x.reshape(-1), group=tp.process_group)
    return out


def all_to_all(x: Tensor, tp: TPGroup) -> Tensor:
    """Send x[r] to rank r and return what each rank sent: result[r] comes from rank r.

    Shapes: x [tp.size, ...], contiguous; the result has the same shape.
    """
    if tp.size == 1:
        return x
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=tp.process_group)
    return out


def min_over_ranks(value: int, tp: TPGroup) -> int:
    """Return the smallest `value` of all ranks, on every rank."""
    if tp.size == 1:
        return value
    smallest = torch.tensor(value, dtype=torch.int64, device=tp.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=tp.process_group)
    return int(smallest.item())


def barrier(tp: TPGroup) -> None:
    """Block the host until every rank has called this."""
    # NCCL's own barrier blocks the stream only. Reading a reduction's result blocks the host on
    # both backends.
    min_over_ranks(0, tp)


def with_peer_memory(tp: TPGroup, width: int, dtype: torch.dtype) -> TPGroup:
    """Return the group with `peers` for all-reduces of rows of `width`, if the GPUs allow it.

    Every rank calls this at the same time, and all get the same outcome. The group is returned
    unchanged, so that NCCL does the all-reduces, if the ranks are on several hosts, a GPU cannot
    access a peer's memory, or `width` is not a multiple of WIDTH_MULTIPLE.
    """
    group, device = tp.process_group, tp.device
    if group is None or not tp.one_host or device.type != "cuda" or width % WIDTH_MULTIPLE:
        return tp
    devices = all_gather(torch.tensor(device.index, device=device), tp).tolist()
    del devices[tp.rank]
    reachable = all(torch.cuda.can_device_access_peer(device, peer) for peer in devices)
    if not min_over_ranks(int(reachable), tp):
        return tp
    row_bytes = width * dtype.itemsize
    max_rows = max(2, _PEER_BUFFER_BYTES // row_bytes)
    one_shot_rows = max_rows if tp.size == 2 else max(1, _ONE_SHOT_BYTES // row_bytes)
    peer_buffers = _make_on_all_ranks(
        tp, lambda: clear_peer_buffers(tp.size, max_rows, width, dtype, device), "NCCL serves"
    )
    if peer_buffers is None:
        return tp
    peers = _make_on_all_ranks(
        tp, lambda: PeerMemory(group, peer_buffers, one_shot_rows), "NCCL serves"
    )
    return replace(tp, peers=peers)


def with_copy_streams(tp: TPGroup, max_rows: int) -> TPGroup:
    """Return the group with `copy_streams`, which carry overlapped all-reduces of up to `max_rows`.

    Every rank of a group with peer memory calls this at the same time, and all get the same
    outcome. The rows have the width and dtype of the peer buffers.
    """
    group, peers, fallback = tp.process_group, tp.peers, "no step runs as micro-batches"
    assert group is not None
    assert peers is not None
    memory = _make_on_all_ranks(
        tp,
        lambda: CopyStreamMemory(tp.size, max_rows, peers.width, peers.dtype, tp.device),
        fallback,
    )
    if memory is None:
        return tp
    return replace(
        tp,
        copy_streams=_make_on_all_ranks(tp, lambda: make_copy_streams(group, memory), fallback)
        or (),
    )


def _make_on_all_ranks(tp: TPGroup, make: Callable[[], T], fallback: str) -> T | None:
    """Return what `make` returns, or None on every rank if it fails on any of them.

    RuntimeError and OSError count as failures. Later calls wait for the peers, so no rank may go
    on to them while another has failed.
    """
    result = None
    try:
        result = make()
    except (RuntimeError, OSError) as error:  # some containers forbid sharing descriptors
        print(
            f"tpllm: no peer memory on {tp.role} rank {tp.rank}, {fallback}: {error}",
            file=sys.stderr,
        )
    return result if min_over_ranks(int(result is not None), tp) else None
