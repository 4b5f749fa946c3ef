from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tpllm.architectures.hf_rope import read_rope
from tpllm.architectures.spec import Rope
from tpllm.layers.rotary import (
    QKNormRope,
    qk_norm_rope_store,
    qk_norm_rope_store_reference,
    qk_norm_rope_store_triton,
    rotary_cos_sin,
)

Where = tuple[torch.device, torch.dtype]
EPS = 1e-6
MAX_POSITIONS = 64
NUM_BLOCKS, BLOCK_SIZE = 9, 4
IMPLEMENTATIONS = [qk_norm_rope_store_triton, qk_norm_rope_store_reference, qk_norm_rope_store]


@dataclass
class Case:
    """Arguments of `qk_norm_rope_store`, in its order; the caches are full of NaN."""

    qkv: Tensor
    rope: QKNormRope
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor

    def run(self, apply: Callable[..., None]) -> None:
        apply(*vars(self).values())

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values in qkv: views [N, heads, D]."""
        num_kv_heads, head_dim = self.k_cache.shape[2:]
        num_heads = self.qkv.shape[1] // head_dim - 2 * num_kv_heads
        heads = self.qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        return q, k, v


def random_case(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    where: Where,
    has_norms: bool = True,
) -> Case:
    device, dtype = where
    rng = torch.Generator().manual_seed(num_tokens * 1000 + num_heads * 10 + head_dim)
    cache_shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=rng)[:num_tokens]
    return Case(
        torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=rng).to(
            device, dtype
        ),
        QKNormRope(
            torch.randint(MAX_POSITIONS, (num_tokens,), generator=rng).int().to(device),
            rotary_cos_sin(head_dim, MAX_POSITIONS, Rope(10_000.0), device),
            (
                (torch.rand(head_dim, generator=rng) + 0.5).to(device, dtype),
                (torch.rand(head_dim, generator=rng) + 0.5).to(device, dtype),
            )
            if has_norms
            else None,
            EPS,
        ),
        torch.full(cache_shape, torch.nan, dtype=dtype, device=device),
        torch.full(cache_shape, torch.nan, dtype=dtype, device=device),
        slots.int().to(device),
    )


def plain_norm_and_rope(
    x: Tensor, weight: Tensor | None, positions: Tensor, cos_sin: Tensor
) -> Tensor:
    """Norm and rotate x [N, heads, D] with every operation in x's own dtype."""
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)
    cos, sin = cos_sin.to(x.dtype)[positions].unsqueeze(1).chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@pytest.mark.parametrize(
    "num_tokens, num_heads, num_kv_heads, head_dim",
    [(1, 1, 1, 2), (1, 2, 1, 64), (5, 4, 4, 20), (3, 12, 2, 128), (7, 9, 3, 6)],
)
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("apply", IMPLEMENTATIONS)
def test_queries_and_keys_are_as_accurate_as_plain_torch(
    apply: Callable[..., None],
    has_norms: bool,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device_and_dtype: Where,
    assert_as_accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    case = random_case(num_tokens, num_heads, num_kv_heads, head_dim, device_and_dtype, has_norms)
    q, k, v = case.heads()
    plain, exact = [], []
    positions, cos_sin = case.rope.positions, case.rope.cos_sin
    for x, weight in zip((q, k), case.rope.norm_weights or (None, None), strict=True):
        plain.append(plain_norm_and_rope(x, weight, positions, cos_sin))
        exact.append(plain_norm_and_rope(x.double(), weight, positions, cos_sin))
    v_before = v.clone()

    case.run(apply)

    assert_as_accurate(q, plain[0], exact[0])
    assert_as_accurate(k, plain[1], exact[1])
    assert torch.equal(v, v_before)


@pytest.mark.parametrize("apply", IMPLEMENTATIONS)
def test_keys_and_values_land_in_their_slots_and_nowhere_else(
    apply: Callable[..., None], device: torch.device
) -> None:
    case = random_case(11, 5, 3, 24, (device, torch.float16))
    case.run(apply)
    _, k, v = case.heads()
    slots = case.slot_mapping.long()
    for cache, stored in ((case.k_cache, k), (case.v_cache, v)):
        rows = cache.view(-1, 3, 24)
        assert torch.equal(rows[slots], stored)
        others = torch.ones(len(rows), dtype=torch.bool, device=device)
        others[slots] = False
        assert rows[others].isnan().all()


@pytest.mark.parametrize("apply", IMPLEMENTATIONS)
def test_rotation_multiplies_pairs_by_a_complex_phase(
    apply: Callable[..., None], device: torch.device
) -> None:
    case = random_case(6, 2, 2, 16, (device, torch.float32))
    q, _, _ = case.heads()
    low, high = q.double().chunk(2, dim=-1)
    scale = torch.rsqrt(q.double().square().mean(-1, keepdim=True) + EPS)
    assert case.rope.norm_weights is not None
    low_weight, high_weight = case.rope.norm_weights[0].double().chunk(2)
    pairs = torch.complex(low * scale * low_weight, high * scale * high_weight)
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2, device=device).double() / 16)
    angles = case.rope.positions.double()[:, None, None] * frequencies
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)

    case.run(apply)

    expected = torch.cat([rotated.real, rotated.imag], dim=-1).float()
    torch.testing.assert_close(q, expected, atol=1e-5, rtol=1e-5)


def test_table_is_cosines_then_sines_and_position_0_does_not_rotate() -> None:
    table = rotary_cos_sin(8, 3, Rope(100.0), torch.device("cpu"))
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    angles = 2 * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(table[2], torch.cat([angles.cos(), angles.sin()]))


SCALED: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 2.5},
    {"rope_type": "yarn", "factor": 0.5},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": True},
]


@pytest.mark.parametrize("outside", [{}, {"original_max_position_embeddings": 96}])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rotations_are_those_of_transformers(
    scaling: dict[str, Any], head_dim: int, outside: dict[str, int]
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields: dict[str, Any] = {"max_position_embeddings": 256, "rope_theta": 5e5}
    fields |= {"head_dim": head_dim, **outside}
    fields["rope_scaling"] = scaling
    theirs = LlamaRotaryEmbedding(LlamaConfig(**deepcopy(fields)))
    positions = torch.arange(2000)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    expected = torch.cat([cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]], dim=-1)
    rope = read_rope("config.json", fields)
    assert torch.equal(rotary_cos_sin(head_dim, 2000, rope, torch.device("cpu")), expected)


def test_no_tokens_store_nothing(device: torch.device) -> None:
    case = random_case(0, 2, 1, 8, (device, torch.float32))
    case.run(qk_norm_rope_store_triton)
    assert case.k_cache.isnan().all() and case.v_cache.isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_slots_pass_two_to_the_31_elements() -> None:
    case = random_case(2, 2, 1, 128, (torch.device("cuda"), torch.bfloat16))
    num_blocks = 2**31 // (128 * BLOCK_SIZE) + 1
    case.k_cache = torch.zeros(num_blocks, BLOCK_SIZE, 1, 128, dtype=torch.bfloat16, device="cuda")
    case.v_cache = torch.zeros_like(case.k_cache)
    case.slot_mapping[1] = num_blocks * BLOCK_SIZE - 1
    case.run(qk_norm_rope_store_triton)
    _, k, v = case.heads()
    assert torch.equal(case.k_cache[-1, -1], k[1])
    assert torch.equal(case.v_cache[-1, -1], v[1])
