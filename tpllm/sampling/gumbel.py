"""Counter-based Gumbel noise: a pure function of (seed, position, token id), on any device.

The same three numbers give the same noise in every batch and on every rank, so each rank can sample
over its own slice of the vocabulary. S sequences.

The 32 random bits of a token id are word `id % 4` of Philox4x32-10 with the seed's two words as the
key and (id // 4, position, 0, 0) as the counter. Kernel and reference agree in every bit.

Sources: Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405; Gumbel (1954).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_reference(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the four random words of Philox4x32-10 for four counter words and two key words.

    Words are int64 tensors that hold uint32 values, of shapes that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap around in int64, which leaves all of their 64 bits right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ k0
        c1 = product1 & _WORD
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c3 = product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def noise_bits_reference(seeds: Tensor, positions: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Return random bits of token ids first_id .. first_id + num_ids - 1: [S, num_ids] int64.

    Each value holds a uint32.

    Args:
        seeds: [S, 2] int32, low and high word
        positions: [S] int32
    """
    first_quad, last_quad = first_id // 4, (first_id + num_ids - 1) // 4
    quads = torch.arange(first_quad, last_quad + 1, device=seeds.device).unsqueeze(0)  # [1, quads]
    zeros = torch.zeros_like(quads)
    key_low, key_high = (seeds.long() & _WORD).unsqueeze(-1).unbind(1)  # [S, 1] each
    position = (positions.long() & _WORD).unsqueeze(1)  # [S, 1]
    words = philox_reference((quads, position, zeros, zeros), (key_low, key_high))
    skipped = first_id - 4 * first_quad
    return torch.stack(words, dim=-1).flatten(1)[:, skipped : skipped + num_ids]


def gumbel_reference(bits: Tensor) -> Tensor:
    """Return standard Gumbel noise, fp32, from uniform 32-bit words; see `gumbel_from_bits`."""
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    # float64, because torch may compute a vector's last elements with another fp32 logarithm than
    # the others, and the noise must not depend on which ids are computed together.
    return -torch.log(-torch.log1p(-u.double())).float()


@triton.jit
def noise_bits(
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    position: tl.tensor,
    first_id: tl.tensor,
    NUM_IDS: tl.constexpr,
) -> tl.tensor:
    """Return random bits of NUM_IDS token ids from first_id, a multiple of 4: [NUM_IDS] uint32."""
    quads = (first_id // 4 + tl.arange(0, NUM_IDS // 4)).to(tl.uint32)
    zeros = tl.zeros_like(quads)
    word0, word1, word2, word3 = tl.philox_impl(
        quads,
        zeros + position.to(tl.uint32),
        zeros,
        zeros,
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def fast_log(x: tl.tensor) -> tl.tensor:
    """Return the natural logarithm by the GPU's own instruction: 2 operations instead of 20.

    The error is at most 2e-7, relative to the logarithm where that is larger than 1.
    """
    log2 = tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    return log2 * 0.6931471805599453


@triton.jit
def gumbel_from_bits(bits: tl.tensor) -> tl.tensor:
    """Return standard Gumbel noise, -log(E) with E = -log(1 - u), from uniform 32-bit words.

    The large values that win over a vocabulary of 150,000 come from small u, where fp32 is dense:
    the tail reaches 22.9 in fine steps. With E = -log(u) they would come from u near 1, where fp32
    has steps of 6e-8, and the tail would end at 16.6 in coarse steps.
    """
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # 1 - u loses the digits of a small u, so small u take the series of -log(1 - u). It leaves out
    # u**6 / 6, a relative error of at most 1.6e-7.
    series = u * (1.0 + u * (1.0 / 2 + u * (1.0 / 3 + u * (1.0 / 4 + u * (1.0 / 5)))))
    exponential = tl.where(u < 1.0 / 16, series, -fast_log(1.0 - u))
    return -fast_log(exponential)
