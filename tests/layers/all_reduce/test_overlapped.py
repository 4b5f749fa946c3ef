"""All-reduces in copy streams: the arithmetic here, over Gloo; the exchanges on several GPUs."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.copy_streams import with_gloo_copy_streams
from tests.marks import FOUR_GPUS
from tests.ranks import run_ranks
from tpllm.architectures.spec import NormSpec, WeightSpec
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.all_reduce.overlapped import overlapped_all_reduce_norm
from tpllm.layers.all_reduce.trial import copy_streams_work
from tpllm.layers.context import LayerContext
from tpllm.layers.norm import rms_norm_reference
from tpllm.parallel.collectives import all_reduce, with_copy_streams, with_peer_memory
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup


def all_reduces_equal_gloos(tp: TPGroup) -> None:
    """This includes fewer rows than ranks, and shares of different sizes."""
    torch.set_num_threads(1)
    E, eps = 40, 1e-6
    tp = with_gloo_copy_streams(tp, 19, E)
    values = torch.Generator().manual_seed(tp.rank)
    same = torch.Generator().manual_seed(9)
    weight = torch.rand(E, generator=same)
    for N in (1, 3, 2, 19, 8):
        x = torch.randn(N, E, generator=values)
        stream = torch.randn(N, E, generator=same) if N % 2 else None
        expected = all_reduce(x.clone(), tp) + (0.0 if stream is None else stream)
        copy_stream = tp.copy_streams[N % 2]
        ours = copy_stream.share(N)
        residual = None if stream is None else stream[ours].clone()
        normed, total = overlapped_all_reduce_norm(x, residual, weight, eps, tp, copy_stream)
        torch.testing.assert_close(total, expected[ours])
        torch.testing.assert_close(normed, rms_norm_reference(expected, weight, eps))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_reduces_in_copy_streams_equal_gloos(world_size: int) -> None:
    run_ranks(all_reduces_equal_gloos, world_size)


@dataclass
class Work:
    """A chain of all-reduces in a copy stream."""

    copy_stream: CopyStream
    partial_sums: Tensor  # [chain, N, E]
    partial_sum: Tensor | None = None  # the next one to be reduced
    stream: Tensor | None = None  # the residual stream
    residuals: list[Tensor] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)


def all_reduces_survive_many_calls(tp: TPGroup, E: int, num_calls: int) -> None:
    """Chains of random sizes run in both copy streams, beside matmuls, with ranks that are late.

    A chain is checked against NCCL when it is over. Inside of it, only the copy streams' own
    exchanges keep the ranks together.
    """
    max_rows, chain = 999, 5
    tp = with_peer_memory(tp, E, torch.bfloat16)
    tp = with_copy_streams(tp, max_rows)
    assert tp.copy_streams
    assert copy_streams_work(tp)
    norm = AllReduceRMSNorm(
        NormSpec(WeightSpec("norm.weight", (E,)), 1e-6), LayerContext(tp, torch.bfloat16)
    )
    norm.weight.fill_(1.5)
    sizes = torch.Generator().manual_seed(0)
    values = torch.Generator(tp.device).manual_seed(tp.rank)
    wrong = torch.zeros((), dtype=torch.int64, device=tp.device)
    factor = torch.ones(E, E, dtype=torch.bfloat16, device=tp.device)
    for call in range(0, num_calls, chain * len(tp.copy_streams)):
        works = []
        for copy_stream in tp.copy_streams:
            N = int(torch.randint(1, max_rows + 1, (), generator=sizes))
            partial_sums = torch.empty(chain, N, E, dtype=torch.bfloat16, device=tp.device)
            works.append(Work(copy_stream, partial_sums.normal_(generator=values)))
        for i in range(chain + 1):
            for work in works:
                if i > 0:  # all-reduce what was launched in the round before
                    assert work.partial_sum is not None
                    normed, work.stream = norm(work.partial_sum, work.stream, work.copy_stream)
                    work.found.append(normed.clone())
                    work.residuals.append(work.stream.clone())
                if i < chain:
                    with work.copy_stream.computing():
                        if (call + i + tp.rank) % 4 == 0:
                            torch.cuda._sleep(200_000)
                        work.partial_sum = work.partial_sums[i] + 0 * torch.mm(
                            work.partial_sums[i], factor
                        )
        for work in works:
            partial_sums, residuals, found = work.partial_sums, work.residuals, work.found
            ours = work.copy_stream.share(partial_sums.shape[1])
            before = torch.zeros_like(residuals[0], dtype=torch.float32)
            for i in range(chain):
                stream = all_reduce(partial_sums[i].float(), tp)[ours] + before
                # the order of fp32 additions can change one rounding to bfloat16
                off = (residuals[i].float() - stream).abs() > 0.01 * stream.abs() + 1e-3
                wrong += off.sum()
                before = residuals[i].float()
                plain = rms_norm_reference(before, norm.weight.float(), 1e-6)
                off = (found[i][ours].float() - plain).abs() > 0.02 * plain.abs() + 1e-2
                wrong += off.sum()
                # all ranks have the same rows, in every bit
                bits = found[i].view(torch.int16).long().sum(1)
                wrong += (all_reduce(bits.clone(), tp) != tp.size * bits).sum()
    assert int(wrong) == 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("E", [1024, 5120])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=FOUR_GPUS)])
def test_all_reduces_in_copy_streams_survive_many_calls(world_size: int, E: int) -> None:
    run_ranks(all_reduces_survive_many_calls, world_size, E, 2000, device="cuda")
