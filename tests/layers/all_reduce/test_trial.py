"""The start-up trials, with peer buffers and copy streams of CPU processes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.copy_streams import GlooCopyStream, with_gloo_copy_streams
from tests.peer_buffers import with_shared_peer_buffers
from tests.ranks import run_ranks
from tpllm.layers.all_reduce.trial import copy_streams_work, peer_memory_works
from tpllm.parallel.group import TPGroup


class WrongCopyStream(GlooCopyStream):
    """Gives one rank the others' partial sums with the wrong sign."""

    def exchange_partial_sums(self, x: Tensor) -> Tensor:
        partial_sums = super().exchange_partial_sums(x)
        return -partial_sums if self._tp.rank == 1 else partial_sums


def trials_find_wrong_all_reduces(tp: TPGroup) -> None:
    torch.set_num_threads(1)
    assert not peer_memory_works(tp)  # there is none
    tp = with_shared_peer_buffers(tp, max_rows=4, one_shot_rows=2, E=40)
    assert tp.peers is not None
    assert peer_memory_works(tp)
    assert copy_streams_work(with_gloo_copy_streams(tp, 9, 40))
    copy_streams = (GlooCopyStream(tp, 9, 40), WrongCopyStream(tp, 9, 40))
    assert not copy_streams_work(replace(tp, copy_streams=copy_streams))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
def test_trials_find_wrong_all_reduces() -> None:
    run_ranks(trials_find_wrong_all_reduces, 2)
