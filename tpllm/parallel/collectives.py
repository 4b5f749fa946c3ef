"""Collectives of the tensor-parallel group, in one place so that their algorithm can change.

Every rank of `tp` calls the same function in the same order with the same shapes and dtypes. With
`tp.size == 1` each one is the identity. `all_reduce` and `all_gather` only enqueue work on the
current stream and can be captured in a CUDA graph; `min_over_ranks` and `barrier` wait for every
rank on the host and belong to start-up.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tpllm.parallel.group import TPGroup

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
