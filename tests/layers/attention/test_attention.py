import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.layers.attention.split_schedules import schedule_of
from tpllm.layers.attention import attention
from tpllm.layers.attention.attention import (
    Attention,
    AttentionBackend,
    AttentionBatch,
    FlashAttention2Backend,
    PrefillBatch,
    SplitDecodeBackend,
    causal_attention,
    make_backend,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_flash_attn = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="no CUDA device or no flash-attn",
)


@dataclass
class Setting:
    """A backend with the device, dtype and block size to test it in."""

    make_backend: Callable[[], AttentionBackend]
    device: str
    dtype: torch.dtype
    block_size: int


@pytest.fixture(
    params=[
        Setting(AttentionBackend, "cpu", torch.float32, 1),
        Setting(AttentionBackend, "cpu", torch.float32, 5),
        Setting(AttentionBackend, "cpu", torch.bfloat16, 16),
        pytest.param(
            Setting(AttentionBackend, "cuda", torch.float32, 16),
            marks=needs_gpu,
        ),
        *(
            pytest.param(
                Setting(FlashAttention2Backend, "cuda", dtype, 256),
                marks=[pytest.mark.gpu, needs_flash_attn],
            )
            for dtype in (torch.float16, torch.bfloat16)
        ),
        pytest.param(Setting(SplitDecodeBackend, "cuda", torch.float32, 16), marks=needs_gpu),
    ],
    ids=lambda s: f"{s.make_backend.__name__}-{s.device}-{s.dtype}-{s.block_size}",
)
def setting(request: pytest.FixtureRequest) -> Setting:
    param: Setting = request.param
    return param


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the newest tokens q [Lq, H, D] over k, v [Lk, K, D], in their dtype."""
    q_len, num_heads, head_dim = q.shape
    k_len, num_kv_heads, _ = k.shape
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
    last_seen = torch.arange(k_len - q_len, k_len, device=q.device)  # of each query
    hidden = torch.arange(k_len, device=q.device) > last_seen[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def padded(rows: list[list[int]], width: int, device: str) -> Tensor:
    """Block tables [len(rows), width] int32, padded with -1."""
    padded_rows = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(padded_rows, dtype=torch.int32, device=device).view(len(rows), width)


def running_sum(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def check_step(
    setting: Setting,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    decode: list[int],
    prefill: list[tuple[int, int]],
    assert_as_accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Run a step and compare each sequence with plain attention over its own tokens.

    `decode` holds the context lengths of decode rows, `prefill` pairs (new tokens, context length).
    Blocks are scattered over the cache, and name_for_people no token wrote is NaN.
    """
    device, dtype, block_size = setting.device, setting.dtype, setting.block_size
    rng = torch.Generator().manual_seed(len(decode) * 100 + len(prefill) * 10 + num_heads)
    q_lens = [1] * len(decode) + [new for new, _ in prefill]
    k_lens = decode + [context for _, context in prefill]
    num_blocks = [-(-k_len // block_size) for k_len in k_lens]
    free = torch.randperm(sum(num_blocks) + 2, generator=rng).tolist()
    tables = [[free.pop() for _ in range(n)] for n in num_blocks]
    cache_shape = (sum(num_blocks) + 2, block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (
        torch.full(cache_shape, torch.nan, dtype=dtype, device=device) for _ in range(2)
    )
    qkv_rows, plain, exact = [], [], []
    for q_len, k_len, table in zip(q_lens, k_lens, tables, strict=True):
        q = torch.randn(q_len, num_heads, head_dim, generator=rng).to(device, dtype)
        k, v = torch.randn(2, k_len, num_kv_heads, head_dim, generator=rng).to(device, dtype)
        slots = torch.tensor(
            [table[t // block_size] * block_size + t % block_size for t in range(k_len)],
            device=device,
        )
        k_cache.view(-1, num_kv_heads, head_dim)[slots] = k
        v_cache.view(-1, num_kv_heads, head_dim)[slots] = v
        new_k, new_v = k[k_len - q_len :], v[k_len - q_len :]
        qkv_rows.append(torch.cat([q, new_k, new_v], dim=1).flatten(1))
        plain.append(plain_attention(q, k, v).flatten(1))
        exact.append(plain_attention(q.double(), k.double(), v.double()).flatten(1))

    width = max(num_blocks) + 1
    batch = AttentionBatch(
        slot_mapping=torch.empty(sum(q_lens), dtype=torch.int32, device=device),
        num_decode=len(decode),
        context_lens=torch.tensor(decode, dtype=torch.int32, device=device),
        block_tables=padded(tables[: len(decode)], width, device),
        split_schedule=schedule_of(decode, num_kv_heads).to(device),
        prefill=None,
    )
    if prefill:
        batch.prefill = PrefillBatch(
            cu_seqlens_q=len(decode) + running_sum(q_lens[len(decode) :], device),
            cu_seqlens_k=running_sum(k_lens[len(decode) :], device),
            max_seqlen_q=max(q_lens[len(decode) :]),
            max_seqlen_k=max(k_lens[len(decode) :]),
            block_tables=padded(tables[len(decode) :], width, device),
            has_context=any(new < context for new, context in prefill),
        )
    attention = Attention(num_heads, num_kv_heads, head_dim, setting.make_backend())
    out = attention(torch.cat(qkv_rows), k_cache, v_cache, batch)
    assert_as_accurate(out, torch.cat(plain), torch.cat(exact))


@pytest.mark.parametrize(
    "decode, prefill",
    [
        pytest.param([1], [], id="one decode row of one token"),
        pytest.param([1, 7, 33, 16, 300], [], id="uneven decode rows"),
        pytest.param([], [(1, 1)], id="a prompt of one token"),
        pytest.param([], [(4, 4), (1, 1), (19, 19)], id="whole prompts"),
        pytest.param([], [(3, 10), (1, 17), (5, 5), (16, 270)], id="chunks after context"),
        pytest.param([6, 1, 21], [(1, 1), (9, 9)], id="decode and whole prompts"),
        pytest.param([2, 40], [(7, 12), (3, 3)], id="decode and chunks after context"),
    ],
)
@pytest.mark.parametrize("num_heads, num_kv_heads", [(4, 4), (6, 2), (5, 1)])
def test_attention_over_the_paged_cache_matches_plain_attention(
    setting: Setting,
    decode: list[int],
    prefill: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    assert_as_accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    check_step(setting, num_heads, num_kv_heads, 64, decode, prefill, assert_as_accurate)


def test_long_chunks_after_a_context_are_computed_in_bands(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(23, 4, 8), torch.randn(40, 2, 8), torch.randn(40, 2, 8)
    whole = causal_attention(q, k, v, 0.3)
    for mask_elements in (40, 300):
        monkeypatch.setattr(attention, "_MASK_ELEMENTS", mask_elements)
        torch.testing.assert_close(causal_attention(q, k, v, 0.3), whole)


def test_torch_backend_takes_any_head_dim(
    assert_as_accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    setting = Setting(AttentionBackend, "cpu", torch.float32, 4)
    check_step(setting, 3, 1, 10, [5, 1], [(2, 6)], assert_as_accurate)


@pytest.mark.parametrize(
    "name, name_for_people, capturable",
    [
        ("torch", "torch", (False, False)),
        ("triton", "split decode, torch prefill", (True, False)),
        pytest.param(
            "flash-attn",
            "split decode, flash-attn 2 prefill",
            (True, True),
            marks=[pytest.mark.gpu, needs_flash_attn],
        ),
    ],
)
def test_a_backend_is_made_by_the_setting(name, name_for_people, capturable) -> None:
    backend = make_backend(name)
    assert backend.name == name_for_people
    assert (backend.capturable, backend.prefill_capturable) == capturable


@pytest.mark.gpu
@needs_flash_attn
def test_captured_decode_follows_lengths_and_tables_changed_in_place() -> None:
    """Block tables keep their width in a graph; their contents and the lengths change."""
    generator = torch.Generator("cuda").manual_seed(0)
    cache_shape = (2, 8, 256, 2, 64)
    k_cache, v_cache = torch.randn(
        cache_shape, generator=generator, device="cuda", dtype=torch.bfloat16
    )
    qkv = torch.randn(3, 8 * 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    batch = AttentionBatch(
        slot_mapping=torch.zeros(3, dtype=torch.int32, device="cuda"),
        num_decode=3,
        context_lens=torch.ones(3, dtype=torch.int32, device="cuda"),
        block_tables=torch.zeros(3, 4, dtype=torch.int32, device="cuda"),
        split_schedule=schedule_of([1, 1, 1], 2).cuda(),
        prefill=None,
    )
    attention = Attention(4, 2, 64, FlashAttention2Backend())
    attention(qkv, k_cache, v_cache, batch)  # warm up outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(qkv, k_cache, v_cache, batch)

    batch.context_lens.copy_(torch.tensor([1, 700, 256]))
    batch.split_schedule.copy_(schedule_of([1, 700, 256], 2))
    batch.block_tables.copy_(padded([[5], [7, 1, 2], [3]], 4, "cuda"))
    graph.replay()
    reference = Attention(4, 2, 64, AttentionBackend())
    expected = reference(qkv.float(), k_cache.float(), v_cache.float(), batch)
    torch.testing.assert_close(captured.float(), expected, atol=2e-2, rtol=2e-2)
