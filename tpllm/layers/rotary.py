"""The steps between QKV projection and attention: QK-norm, rotary embedding, KV cache store.

They are one kernel with one pass over memory. Some families have no QK-norm.

N tokens, H query heads, K key/value heads, D head_dim, L positions.

Sources: RoFormer (2021), https://arxiv.org/abs/2104.09864, in the "rotate half" pairing of
GPT-NeoX; per-head norms of q and k as in the Qwen3 Technical Report, https://arxiv.org/abs/2505.09388
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.architectures.spec import Rope

_MAX_HEADS_PER_PROGRAM = 8


def rotary_cos_sin(head_dim: int, max_positions: int, rope: Rope, device: torch.device) -> Tensor:
    """Return the rotation at every position: [max_positions, head_dim] fp32, cosines | sines.

    Without scaling, position p rotates pair i, elements i and i + D/2, by the angle
    p * theta ** (-2i / D).
    """
    # The angles are computed in fp32, as in transformers. At position 30,000 they are off by 1e-3,
    # but more exact angles would differ from the reference implementation.
    frequencies = _frequencies(head_dim, rope).to(device)  # [D/2]
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = positions[:, None] * frequencies  # [L, D/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * rope.attention_factor  # [L, D]


def _frequencies(D: int, rope: Rope) -> Tensor:
    """Return the angle [D/2] of each pair at position 1, computed as transformers does."""
    powers = rope.theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    plain = 1.0 / powers
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        return _llama3_frequencies(plain, rope)
    if rope.rope_type == "yarn":
        return _yarn_frequencies(powers, rope)
    return plain


def _llama3_frequencies(plain: Tensor, rope: Rope) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, interpolate between them [D/2]."""
    length, low, high = (
        rope.original_max_position_embeddings,
        rope.low_freq_factor,
        rope.high_freq_factor,
    )
    periods = 2 * math.pi / plain
    scaled = torch.where(periods > length / low, plain / rope.factor, plain)
    smooth = (length / periods - low) / (high - low)
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_between = ~(periods < length / high) & ~(periods > length / low)
    return torch.where(is_between, between, scaled)


def _yarn_frequencies(powers: Tensor, rope: Rope) -> Tensor:
    """Divide by the factor what rotates seldom in the original context, keep the rest [D/2].

    Source: YaRN (2023), https://arxiv.org/abs/2309.00071
    """
    D = 2 * len(powers)

    def dim_of(rotations: float) -> float:
        """Return the dimension that rotates so often in the original context."""
        length = rope.original_max_position_embeddings
        return D * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001  # against a division by 0
    ramp = ((torch.arange(D // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


@dataclass(frozen=True)
class QKNormRope:
    """Norms and rotation that attention applies to a step's raw queries and keys.

    Attributes:
        positions: [N] int32, each token's index in its sequence, below L
        cos_sin: [L, D] fp32, from `rotary_cos_sin`
        norm_weights: [D] each, scales of the queries' and the keys' norm; None to rotate alone
        eps: added to the norm's mean square
    """

    positions: Tensor
    cos_sin: Tensor
    norm_weights: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0


def qk_norm_rope_store_reference(
    qkv: Tensor, rope: QKNormRope, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Compute `qk_norm_rope_store` in plain torch."""
    H, K, D = _heads(qkv, k_cache)
    q, k, v = qkv.view(qkv.shape[0], H + 2 * K, D).split([H, K, K], dim=1)  # views of qkv
    cos, sin = rope.cos_sin[rope.positions].unsqueeze(1).chunk(2, dim=-1)  # [N, 1, D/2] each
    for i, x in enumerate((q, k)):
        x_fp32 = x.float()
        if rope.norm_weights is not None:
            scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + rope.eps)
            x_fp32 = x_fp32 * scale * rope.norm_weights[i].float()
        low, high = x_fp32.chunk(2, dim=-1)
        x.copy_(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))
    k_cache.view(-1, K, D)[slot_mapping] = k
    v_cache.view(-1, K, D)[slot_mapping] = v


def _heads(qkv: Tensor, k_cache: Tensor) -> tuple[int, int, int]:
    """Return H, K and D of queries | keys | values, [N, (H + 2K) * D]."""
    K, D = k_cache.shape[2:]
    return qkv.shape[1] // D - 2 * K, K, D


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr: tl.tensor,  # [N, (H + 2K) * D]
    q_weight_ptr: tl.tensor,  # [D], this, the next and eps only if HAS_NORM
    k_weight_ptr: tl.tensor,  # [D]
    positions_ptr: tl.tensor,  # [N]
    cos_sin_ptr: tl.tensor,  # [L, D]
    k_cache_ptr: tl.tensor,  # [slots, K, D]
    v_cache_ptr: tl.tensor,  # [slots, K, D]
    slot_mapping_ptr: tl.tensor,  # [N]
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # heads a program, a power of two
    HALF: tl.constexpr,  # D / 2, rounded up to a power of two
) -> None:
    """Process HEADS of a token's H + K heads in each program; key heads also store their values."""
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1], q then k
    col = tl.arange(0, HALF)[None, :]  # [1, HALF], column of a pair's low element
    in_half = col < D // 2
    mask = (head < H + K) & in_half  # [HEADS, HALF]
    is_key = head >= H  # [HEADS, 1]
    key_mask = mask & is_key

    # int64: token * stride and slot * K * D pass 2**31 in long batches and large caches.
    low_ptrs = qkv_ptr + token.to(tl.int64) * qkv_stride + head * D + col
    high_ptrs = low_ptrs + D // 2
    low = tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_ptrs, mask=mask, other=0.0).to(tl.float32)

    if HAS_NORM:
        mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D  # [HEADS]
        scale = tl.rsqrt(mean_square + eps)[:, None]
        q_weight = q_weight_ptr + col
        k_weight = k_weight_ptr + col
        weight_low = tl.where(
            is_key,
            tl.load(k_weight, mask=in_half, other=0.0).to(tl.float32),
            tl.load(q_weight, mask=in_half, other=0.0).to(tl.float32),
        )
        weight_high = tl.where(
            is_key,
            tl.load(k_weight + D // 2, mask=in_half, other=0.0).to(tl.float32),
            tl.load(q_weight + D // 2, mask=in_half, other=0.0).to(tl.float32),
        )
        low = low * scale * weight_low
        high = high * scale * weight_high

    cos_ptrs = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * D + col
    cos = tl.load(cos_ptrs, mask=in_half, other=0.0)
    sin = tl.load(cos_ptrs + D // 2, mask=in_half, other=0.0)
    roped_low = low * cos - high * sin
    roped_high = high * cos + low * sin
    tl.store(low_ptrs, roped_low, mask=mask)
    tl.store(high_ptrs, roped_high, mask=mask)

    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    cache_offsets = slot * (K * D) + (head - H) * D + col
    tl.store(k_cache_ptr + cache_offsets, roped_low, mask=key_mask)
    tl.store(k_cache_ptr + cache_offsets + D // 2, roped_high, mask=key_mask)
    # In qkv, the value of a head is K heads after its key.
    value_low = tl.load(low_ptrs + K * D, mask=key_mask, other=0.0)
    value_high = tl.load(high_ptrs + K * D, mask=key_mask, other=0.0)
    tl.store(v_cache_ptr + cache_offsets, value_low, mask=key_mask)
    tl.store(v_cache_ptr + cache_offsets + D // 2, value_high, mask=key_mask)


def qk_norm_rope_store_triton(
    qkv: Tensor, rope: QKNormRope, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Launch the kernel; see `qk_norm_rope_store`."""
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    H, K, D = _heads(qkv, k_cache)
    q_weight, k_weight = rope.norm_weights or (qkv, qkv)
    heads_per_program = min(_MAX_HEADS_PER_PROGRAM, triton.next_power_of_2(H + K))
    grid = (qkv.shape[0], triton.cdiv(H + K, heads_per_program))
    _qk_norm_rope_store_kernel[grid](
        qkv,
        q_weight,
        k_weight,
        rope.positions,
        rope.cos_sin,
        k_cache,
        v_cache,
        slot_mapping,
        qkv.stride(0),
        rope.eps,
        HAS_NORM=rope.norm_weights is not None,
        H=H,
        K=K,
        D=D,
        HEADS=heads_per_program,
        HALF=triton.next_power_of_2(D // 2),
    )


def qk_norm_rope_store(
    qkv: Tensor, rope: QKNormRope, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Norm and rotate the queries and keys in qkv in place, and store keys and values in the cache.

    Each head's D elements are RMS-normalised and scaled by its weight, if there is one, and rotated
    by the token's position. This is computed in fp32, with one rounding to qkv's dtype at the end.

    Args:
        qkv: [N, (H + 2K) * D], queries | keys | values, contiguous; changed in place
        k_cache, v_cache: [num_blocks, block_size, K, D], contiguous; written at slot_mapping
        slot_mapping: [N] int32, block * block_size + offset of each token, never negative
    """
    apply = qk_norm_rope_store_triton if qkv.is_cuda else qk_norm_rope_store_reference
    apply(qkv, rope, k_cache, v_cache, slot_mapping)
