"""Start-up trial, run by all ranks together: whether all-reduces over peer memory are correct."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from tpllm.layers.all_reduce.all_reduce_norm import all_reduce_norm
from tpllm.layers.all_reduce.overlapped import overlapped_all_reduce_norm
from tpllm.layers.norm import rms_norm_reference
from tpllm.parallel.collectives import all_reduce, min_over_ranks
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup

_EPS = 1e-6


def peer_memory_works(tp: TPGroup) -> bool:
    """Whether all-reduces through peer buffers are correct, one-shot and two-shot.

    False if the group has no peer buffers.
    """
    peers = tp.peers
    if peers is None:
        return False
    sizes = (peers.one_shot_rows, 1, peers.max_rows // 2, 3 * peers.max_rows + 1, 3)
    return _are_correct(tp, sizes, partial(_through_peer_buffers, tp))


def copy_streams_work(tp: TPGroup) -> bool:
    """Whether all-reduces in every copy stream of a group with peer memory are correct."""
    sizes = (1, 2 * tp.size + 1, 3)
    return all(
        [
            _are_correct(tp, sizes, partial(_overlapped, tp, copy_stream))
            for copy_stream in tp.copy_streams
        ]
    )


def _through_peer_buffers(tp: TPGroup, x: Tensor, weight: Tensor) -> Tensor:
    return all_reduce_norm(x, torch.empty_like(x), weight, _EPS, tp, has_residual=False)


def _overlapped(tp: TPGroup, copy_stream: CopyStream, x: Tensor, weight: Tensor) -> Tensor:
    with copy_stream.computing():
        partial_sum = x.clone()
    return overlapped_all_reduce_norm(partial_sum, None, weight, _EPS, tp, copy_stream)[0]


def _are_correct(
    tp: TPGroup, sizes: Iterable[int], all_reduce_norm_fn: Callable[[Tensor, Tensor], Tensor]
) -> bool:
    """Whether `all_reduce_norm_fn(x, weight)` is the normed all-reduce, on all ranks."""
    peers = tp.peers
    assert peers is not None
    generator = torch.Generator(tp.device).manual_seed(tp.rank)
    weight = torch.ones(peers.width, dtype=peers.dtype, device=tp.device)
    correct = True
    for num_rows in sizes:
        x = torch.empty(num_rows, peers.width, dtype=peers.dtype, device=tp.device)
        x.normal_(generator=generator)
        x[:, :8] = -0.0  # values that look like an empty peer buffer
        expected = rms_norm_reference(all_reduce(x.clone(), tp), weight, _EPS)
        correct &= torch.allclose(all_reduce_norm_fn(x, weight), expected, rtol=0.02, atol=0.02)
    return bool(min_over_ranks(int(correct), tp))
