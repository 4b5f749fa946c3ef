"""Split decode attention against plain torch, over scattered pages and uneven contexts."""

import pytest
import torch
from torch import Tensor

from tpllm.layers import paged_decode
from tpllm.layers.attention import AttentionBatch, TorchAttentionBackend
from tpllm.layers.paged_decode import PagedDecode


def make_case(
    contexts: list[int], K: int, G: int, D: int, block_size: int, device, dtype
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """Queries, and a cache whose pages are out of order; what nobody may read is NaN."""
    generator = torch.Generator().manual_seed(0)
    S = len(contexts)
    width = -(-max(contexts) // block_size) + 2  # wider than any sequence needs
    pages = torch.randperm(S * width, generator=generator).int().view(S, width)
    q = torch.randn(S, K * G, D, generator=generator)
    caches = torch.full((2, S * width, block_size, K, D), torch.nan)
    for row, context in enumerate(contexts):
        for token in range(context):
            page = pages[row, token // block_size]
            caches[:, page, token % block_size] = torch.randn(2, K, D, generator=generator)
    nothing = torch.empty(0, dtype=torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    batch = AttentionBatch(nothing, S, lengths.to(device), pages.to(device), None)
    q, caches = q.to(device, dtype), caches.to(device, dtype)
    return q, caches[0], caches[1], batch


@pytest.mark.parametrize("parts", [1, 3, 64])
@pytest.mark.parametrize(
    "contexts, K, G, D, block_size",
    [([1], 1, 1, 16, 4), ([130, 1, 64, 65, 200], 2, 3, 32, 16), ([300, 7], 1, 8, 48, 256)],
)
def test_matches_plain_torch(
    contexts, K, G, D, block_size, parts, device_and_dtype, assert_as_accurate, monkeypatch
) -> None:
    device, dtype = device_and_dtype
    monkeypatch.setattr(paged_decode, "_MAX_PARTS", parts)
    monkeypatch.setattr(paged_decode, "_MIN_PART", 64)
    q, k_cache, v_cache, batch = make_case(contexts, K, G, D, block_size, device, dtype)
    plain = TorchAttentionBackend().decode(q, k_cache, v_cache, batch, 0.3)
    exact = TorchAttentionBackend().decode(
        q.double(), k_cache.double(), v_cache.double(), batch, 0.3
    )
    decode = PagedDecode()
    for _ in range(2):  # the second time on used scratch memory
        ours = decode(q, k_cache, v_cache, batch.context_lens, batch.block_tables, 0.3)
        assert_as_accurate(ours, plain, exact)


def test_the_number_of_parts_follows_the_context(device, monkeypatch) -> None:
    """One program for a head of a short context, however many the grid has."""
    monkeypatch.setattr(paged_decode, "_MIN_PART", 64)
    q, k_cache, v_cache, batch = make_case([64, 640], 1, 2, 16, 16, device, torch.float32)
    decode = PagedDecode()
    decode(q, k_cache, v_cache, batch.context_lens, batch.block_tables, 1.0)
    assert decode._scratch is not None
    counters, parts = decode._scratch
    assert int(counters.abs().sum()) == 0  # left as they were found
    parts.fill_(torch.nan)
    decode(q[:1], k_cache, v_cache, batch.context_lens[:1], batch.block_tables[:1], 1.0)
    assert bool(parts.isnan().all())
