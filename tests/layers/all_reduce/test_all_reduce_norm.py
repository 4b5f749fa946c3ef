"""The fused all-reduce, residual addition and norm: arithmetic here, exchanges on several GPUs."""

import pytest
import torch
import triton
import triton.language as tl

from tests.peer_buffers import with_shared_peer_buffers
from tests.ranks import run_ranks
from tpllm.architectures.spec import NormSpec, WeightSpec
from tpllm.layers.all_reduce.all_reduce_norm import (
    AllReduceRMSNorm,
    all_reduce_norm,
    kept_rows,
    receive,
    sendable,
)
from tpllm.layers.all_reduce.trial import peer_memory_works
from tpllm.layers.context import LayerContext
from tpllm.layers.norm import add_and_norm, rms_norm_reference
from tpllm.parallel.collectives import all_reduce, with_peer_memory
from tpllm.parallel.group import TPGroup
from tpllm.parallel.peer_memory import EMPTY


@triton.jit
def _add_and_norm_row(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, E: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    cols = tl.arange(0, 128)
    mask = cols < E
    start = tl.program_id(0) * E
    x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    residual_ptrs = residual_ptr + start + cols
    residual = tl.zeros([128], dtype=tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    total, normed = add_and_norm(x, residual, weight, x_ptr.dtype.element_ty, eps, E)
    tl.store(residual_ptrs, total, mask=mask)
    tl.store(out_ptr + start + cols, normed, mask=mask)


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("N, E", [(1, 8), (5, 100), (3, 128)])
def test_add_and_norm_matches_reference(device_and_dtype, N: int, E: int, has_residual: bool):
    device, dtype = device_and_dtype
    torch.manual_seed(0)
    x, residual = (torch.randn(N, E, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(E, device=device).to(dtype)
    expected_residual = residual.clone() if has_residual else x.clone()
    expected = rms_norm_reference(
        x.clone(), weight, 1e-6, expected_residual if has_residual else None
    )
    if not has_residual:
        residual.fill_(torch.nan)
    out = torch.full_like(x, torch.nan)
    _add_and_norm_row[(N,)](x, residual, weight, out, 1e-6, E=E, HAS_RESIDUAL=has_residual)
    assert torch.equal(residual, expected_residual)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@triton.jit
def _send_and_receive(x_ptr, buffer_ptr, out_ptr, E: tl.constexpr):
    cols = tl.arange(0, 16)
    mask = cols < E
    tl.store(buffer_ptr + cols, sendable(tl.load(x_ptr + cols, mask=mask)), mask=mask)
    tl.store(out_ptr + cols, receive(buffer_ptr + cols, mask), mask=mask)


def test_a_row_passes_through_a_peer_buffer_and_leaves_it_empty(device_and_dtype) -> None:
    device, dtype = device_and_dtype
    values = [1.0, -1.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, -6e-8, 65504.0, 0.1]
    x = torch.tensor(values, device=device).to(dtype)
    peer_buffer = torch.full_like(x, EMPTY)
    out = torch.empty_like(x)
    _send_and_receive[(1,)](x, peer_buffer, out, E=len(values))
    assert torch.equal(out.nan_to_num(7.0), x.nan_to_num(7.0))
    assert peer_buffer.signbit().all() and not peer_buffer.any()


def all_reduces_equal_gloos(tp: TPGroup, one_shot_rows: int) -> None:
    """All-reduces of few and many rows alternate, one-shot and two-shot, and use both buffers."""
    torch.set_num_threads(1)
    E, eps = 40, 1e-6
    tp = with_shared_peer_buffers(tp, 8, one_shot_rows, E)
    values = torch.Generator().manual_seed(tp.rank)
    same = torch.Generator().manual_seed(9)
    weight = torch.rand(E, generator=same)
    for N in (1, 3, 2, 4, 7, 1, 9, 5, 2, 3, 19, 1):
        x = torch.randn(N, E, generator=values)
        x[:, ::5] = -0.0
        residual = torch.randn(N, E, generator=same) if N % 2 else None
        expected = all_reduce(x.clone(), tp) + (0.0 if residual is None else residual)
        kept = kept_rows(N, tp)
        assert kept == (slice(None) if one_shot_rows >= N else slice(tp.rank, None, tp.size))
        total = torch.full_like(x, torch.nan) if residual is None else residual.clone()
        normed = all_reduce_norm(x, total, weight, eps, tp, has_residual=residual is not None)
        torch.testing.assert_close(total[kept], expected[kept])
        torch.testing.assert_close(normed, rms_norm_reference(expected, weight, eps))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
@pytest.mark.parametrize("world_size, one_shot_rows", [(2, 4), (2, 2), (3, 1), (4, 1)])
def test_all_reduces_through_peer_buffers_equal_gloos(world_size: int, one_shot_rows: int) -> None:
    run_ranks(all_reduces_equal_gloos, world_size, one_shot_rows)


def all_reduces_survive_many_calls(tp: TPGroup, E: int, num_calls: int) -> None:
    """Random sizes are checked against NCCL; ranks arrive at different times."""
    tp = with_peer_memory(tp, E, torch.bfloat16)
    assert tp.peers is not None
    assert peer_memory_works(tp)
    norm = AllReduceRMSNorm(
        NormSpec(WeightSpec("norm.weight", (E,)), 1e-6), LayerContext(tp, torch.bfloat16)
    )
    norm.weight.fill_(1.5)
    sizes = torch.Generator().manual_seed(0)
    values = torch.Generator(tp.device).manual_seed(tp.rank)
    wrong = torch.zeros((), dtype=torch.int64, device=tp.device)
    for call in range(num_calls):
        N = int(torch.randint(1, 2 * tp.peers.max_rows + 1, (), generator=sizes))
        N = N if call % 3 else N % 9 + 1
        partial_sum = torch.empty(N, E, dtype=torch.bfloat16, device=tp.device).normal_(
            generator=values
        )
        total = all_reduce(partial_sum.float(), tp)
        if (call + tp.rank) % 5 == 0:
            torch.cuda._sleep(200_000)  # this rank is late
        normed, residual = norm(partial_sum)
        kept = kept_rows(N, tp)
        # the order of fp32 additions can change one rounding to bfloat16
        wrong += ((residual.float() - total).abs() > 0.01 * total.abs() + 1e-3)[kept].sum()
        plain = rms_norm_reference(total, norm.weight.float(), 1e-6)
        wrong += ((normed.float() - plain).abs() > 0.02 * plain.abs() + 1e-2).sum()
    assert int(wrong) == 0


def a_graph_of_all_reduces_replays(tp: TPGroup) -> None:
    """An odd number of all-reduces: each replay starts with the other buffer."""
    E, N = 1024, 7
    tp = with_peer_memory(tp, E, torch.bfloat16)
    assert tp.peers is not None
    values = torch.Generator(tp.device).manual_seed(tp.rank)
    partial_sums = torch.randn(3, N, E, device=tp.device, generator=values).bfloat16()
    weight = torch.ones(E, device=tp.device, dtype=torch.bfloat16)
    residual = torch.empty(N, E, device=tp.device, dtype=torch.bfloat16)

    def three_all_reduces() -> torch.Tensor:
        for i, partial_sum in enumerate(partial_sums):
            out = all_reduce_norm(partial_sum, residual, weight, 1e-6, tp, has_residual=i > 0)
        return out

    expected = three_all_reduces().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = three_all_reduces()
    for _ in range(200):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("E", [1024, 5120])
def test_all_reduces_survive_many_calls(E: int) -> None:
    run_ranks(all_reduces_survive_many_calls, torch.cuda.device_count(), E, 3000, device="cuda")


@pytest.mark.multi_gpu
def test_a_graph_of_all_reduces_replays() -> None:
    run_ranks(a_graph_of_all_reduces_replays, torch.cuda.device_count(), device="cuda")
