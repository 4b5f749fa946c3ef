"""Split decode attention against plain torch, over scattered pages and uneven contexts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.layers.attention.split_schedules import schedule_of
from tpllm.architectures.spec import Rope
from tpllm.layers.attention import split_schedule
from tpllm.layers.attention.attention import AttentionBackend, AttentionBatch
from tpllm.layers.attention.paged_decode import PagedDecode
from tpllm.layers.attention.split_schedule import ContextSplit, SplitSchedules
from tpllm.layers.rotary import QKNormRope, qk_norm_rope_store_reference, rotary_cos_sin


def make_case(
    contexts: list[int], K: int, G: int, D: int, block_size: int, device, dtype
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """Return queries, and a cache whose pages are out of order and NaN where no token is."""
    generator = torch.Generator().manual_seed(0)
    S = len(contexts)
    width = -(-max(contexts) // block_size) + 2  # wider than any sequence needs
    pages = torch.randperm(S * width, generator=generator).int().view(S, width)
    tables = pages.clone()
    for row, context in enumerate(contexts):
        tables[row, -(-context // block_size) :] = -1
    q = torch.randn(S, K * G, D, generator=generator)
    caches = torch.full((2, S * width, block_size, K, D), torch.nan)
    for row, context in enumerate(contexts):
        for token in range(context):
            page = pages[row, token // block_size]
            caches[:, page, token % block_size] = torch.randn(2, K, D, generator=generator)
    nothing = torch.empty(0, dtype=torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    schedule = schedule_of(contexts, K).to(device)
    batch = AttentionBatch(nothing, S, lengths.to(device), tables.to(device), schedule, None)
    q, caches = q.to(device, dtype), caches.to(device, dtype)
    return q, caches[0], caches[1], batch


def plain_and_exact(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch
) -> tuple[Tensor, Tensor]:
    """Return plain torch's result in the same dtype, and in float64."""
    decode = AttentionBackend().decode
    exact = decode(q.double(), k_cache.double(), v_cache.double(), batch, 0.3)
    return decode(q, k_cache, v_cache, batch, 0.3), exact


@pytest.fixture(params=["whole contexts", "some split", "many splits", "small programs"])
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ways to divide contexts; splits are as short as possible."""
    monkeypatch.setattr(split_schedule, "_MIN_SPLIT_TOKENS", split_schedule.SPLIT_GRANULARITY)
    match request.param:
        case "whole contexts":
            monkeypatch.setattr(split_schedule, "_MAX_SPLITS", 1)
        case "some split":
            monkeypatch.setattr(split_schedule, "_LARGE_PROGRAMS", 14)
        case "small programs":
            monkeypatch.setattr(ContextSplit, "has_large_programs", lambda split, num_seqs: False)


@pytest.mark.usefixtures("division")
@pytest.mark.parametrize(
    "contexts, K, G, D, block_size",
    [
        ([1], 1, 1, 16, 4),
        ([130, 1, 64, 65, 200], 2, 3, 32, 16),
        ([300, 7], 1, 8, 48, 256),
        ([129, 260, 64], 1, 2, 16, 64),  # each tile has a page of its own
        ([97, 32, 33], 2, 7, 16, 32),
    ],
)
def test_matches_plain_torch(
    contexts, K, G, D, block_size, device_and_dtype, assert_as_accurate
) -> None:
    device, dtype = device_and_dtype
    q, k_cache, v_cache, batch = make_case(contexts, K, G, D, block_size, device, dtype)
    plain, exact = plain_and_exact(q, k_cache, v_cache, batch)
    decode = PagedDecode().decode
    for _ in range(2):  # the second call finds used scratch memory
        ours = decode(q, k_cache, v_cache, batch, 0.3)
        assert_as_accurate(ours, plain, exact)


def test_a_context_in_one_split_needs_no_scratch(device) -> None:
    q, k_cache, v_cache, batch = make_case([64, 640], 1, 2, 16, 16, device, torch.float32)
    paged = PagedDecode()
    paged.decode(q, k_cache, v_cache, batch, 1.0)
    assert paged._scratch is not None
    counters, scratch = paged._scratch
    assert int(counters.abs().sum()) == 0  # left as they were found
    scratch.fill_(torch.nan)
    batch.block_tables = batch.block_tables[:1]
    batch.split_schedule = schedule_of([64], 1).to(device)
    paged.decode(q[:1], k_cache, v_cache, batch, 1.0)
    assert bool(scratch.isnan().all())


@pytest.mark.usefixtures("division")
@pytest.mark.parametrize(
    "contexts, K, G, D, block_size",
    [([1], 1, 1, 16, 4), ([130, 1, 64, 65, 200], 2, 3, 32, 16), ([300, 7], 1, 7, 48, 256)],
)
@pytest.mark.parametrize("has_norms", [True, False])
def test_norms_rotates_and_stores_in_the_same_kernel(
    has_norms, contexts, K, G, D, block_size, device_and_dtype, assert_as_accurate
) -> None:
    """The result equals the store's kernel followed by attention."""
    device, dtype = device_and_dtype
    _, k_cache, v_cache, batch = make_case(contexts, K, G, D, block_size, device, dtype)
    generator = torch.Generator().manual_seed(1)
    S, H = len(contexts), K * G
    qkv = torch.randn(S, (H + 2 * K) * D, generator=generator).to(device, dtype)
    q_weight, k_weight = torch.rand(2, D, generator=generator).to(device, dtype)
    cos_sin = rotary_cos_sin(D, max(contexts), Rope(1e4), device)
    positions = batch.context_lens - 1
    pages = batch.block_tables[torch.arange(S, device=device), positions // block_size]
    slots = pages * block_size + positions % block_size
    k_cache.view(-1, K, D)[slots] = v_cache.view(-1, K, D)[slots] = torch.nan  # the newest token's

    rope = QKNormRope(positions, cos_sin, (q_weight, k_weight) if has_norms else None, 1e-6)

    def apart(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        rotated, keys, values = (t.to(dtype, copy=True) for t in (qkv, k_cache, v_cache))
        qk_norm_rope_store_reference(rotated, rope, keys, values, slots)
        q = rotated.view(S, -1, D)[:, :H]
        return AttentionBackend().decode(q, keys, values, batch, 0.3), keys, values

    plain, plain_keys, plain_values = apart(dtype)
    exact, exact_keys, _ = apart(torch.float64)
    q = qkv.view(S, -1, D)[:, :H]
    ours = PagedDecode().decode(q, k_cache, v_cache, batch, 0.3, rope)
    assert_as_accurate(ours, plain, exact)
    at_slots = [cache.view(-1, K, D)[slots] for cache in (k_cache, plain_keys, exact_keys)]
    assert_as_accurate(*at_slots)
    assert torch.equal(v_cache.view(-1, K, D)[slots], plain_values.view(-1, K, D)[slots])


def test_an_extended_schedule_reads_the_new_tokens(
    device_and_dtype, assert_as_accurate, monkeypatch
) -> None:
    """The last split of a context may also have grown by a page."""
    device, dtype = device_and_dtype
    monkeypatch.setattr(split_schedule, "_MIN_SPLIT_TOKENS", split_schedule.SPLIT_GRANULARITY)
    contexts = [130, 65, 200]
    q, k_cache, v_cache, batch = make_case(contexts, 2, 3, 32, 16, device, dtype)
    schedules = SplitSchedules(ContextSplit(2))
    for missing in range(20, 0, -1):
        schedules.next(np.array(contexts) - missing)
    schedule = torch.from_numpy(schedules.next(np.array(contexts))).to(device)
    assert not torch.equal(schedule, batch.split_schedule)
    batch.split_schedule = schedule
    ours = PagedDecode().decode(q, k_cache, v_cache, batch, 0.3)
    assert_as_accurate(ours, *plain_and_exact(q, k_cache, v_cache, batch))
