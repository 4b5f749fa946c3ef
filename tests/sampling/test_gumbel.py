import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.sampling.gumbel import (
    gumbel_from_bits,
    gumbel_reference,
    noise_bits,
    noise_bits_reference,
    philox_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@triton.jit
def _noise_bits_kernel(seeds_ptr, positions_ptr, out_ptr, first_id, NUM_IDS: tl.constexpr):
    row = tl.program_id(0)
    seed_low, seed_high = tl.load(seeds_ptr + 2 * row), tl.load(seeds_ptr + 2 * row + 1)
    bits = noise_bits(seed_low, seed_high, tl.load(positions_ptr + row), first_id, NUM_IDS)
    tl.store(out_ptr + row * NUM_IDS + tl.arange(0, NUM_IDS), bits.to(tl.int32, bitcast=True))


def noise_bits_triton(seeds: Tensor, positions: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Run `noise_bits` in a kernel; shape and dtype are those of the reference."""
    out = seeds.new_empty(len(seeds), num_ids)
    _noise_bits_kernel[(len(seeds),)](seeds, positions, out, first_id, NUM_IDS=num_ids)
    return out.long() & 0xFFFFFFFF


@triton.jit
def _gumbel_kernel(bits_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + offsets, mask=offsets < size, other=0)
    noise = gumbel_from_bits(bits.to(tl.uint32, bitcast=True))
    tl.store(out_ptr + offsets, noise, mask=offsets < size)


def gumbel_triton(bits: Tensor) -> Tensor:
    out = torch.empty(len(bits), device=bits.device)
    block = triton.next_power_of_2(len(bits))
    _gumbel_kernel[(1,)](bits.to(torch.int32), out, len(bits), BLOCK=block)
    return out


def random_rows(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return seeds of all 64 bits and positions of all int32 values."""
    rng = torch.Generator().manual_seed(num_rows)
    seeds = torch.randint(-(2**31), 2**31, (num_rows, 2), generator=rng).int()
    positions = torch.randint(2**31, (num_rows,), generator=rng).int()
    return seeds.to(device), positions.to(device)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_returns_the_vectors_of_its_authors(
    counter: list[int], key: list[int], expected: str
) -> None:
    words = philox_reference(
        tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key)
    )
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_kernel_gives_the_philox_vector_of_zeros(device: torch.device) -> None:
    zeros = torch.zeros(1, 2, dtype=torch.int32, device=device)
    bits = noise_bits_triton(zeros, zeros[0], 0, 4)
    assert bits[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("first_id", [0, 4, 75_968, 2**31 - 256])
def test_kernel_and_reference_bits_are_equal(first_id: int, device: torch.device) -> None:
    seeds, positions = random_rows(5, device)
    expected = noise_bits_reference(seeds, positions, first_id, 64)
    assert torch.equal(noise_bits_triton(seeds, positions, first_id, 64), expected)


@pytest.mark.parametrize("first_id, num_ids", [(0, 1), (1, 1), (3, 2), (4, 4), (5, 90), (0, 101)])
def test_noise_does_not_depend_on_the_slice(first_id: int, num_ids: int) -> None:
    seeds, positions = random_rows(6, torch.device("cpu"))
    bits = noise_bits_reference(seeds, positions, 0, 101)
    noise = gumbel_reference(bits)
    rows = torch.tensor([4, 1, 2])
    ids = slice(first_id, first_id + num_ids)
    some_bits = noise_bits_reference(seeds[rows], positions[rows], first_id, num_ids)
    assert torch.equal(some_bits, bits[rows, ids])
    assert torch.equal(gumbel_reference(some_bits), noise[rows, ids])


def test_seed_words_position_and_id_each_change_the_noise() -> None:
    seeds = torch.tensor([[1, 2], [2, 2], [1, 3], [1, 2]], dtype=torch.int32)
    positions = torch.tensor([7, 7, 7, 8], dtype=torch.int32)
    bits = noise_bits_reference(seeds, positions, 0, 1000)
    assert bits.unique().numel() == 4000


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_gumbel_follows_the_exact_formula(implementation: str, device: torch.device) -> None:
    gumbel = {"triton": gumbel_triton, "reference": gumbel_reference}[implementation]
    rng = torch.Generator().manual_seed(0)
    around_powers = torch.cat([2**exponent + torch.arange(-3, 4) for exponent in range(3, 32)])
    bits = torch.cat(
        [
            torch.arange(8),
            around_powers,
            torch.arange(2**28 - 512, 2**28 + 512, 37),  # the border between series and logarithm
            torch.randint(2**32, (500,), generator=rng),
        ]
    ).to(device)
    u = (bits.double() + 0.5) / 2**32
    exact = -torch.log(-torch.log1p(-u))
    noise = gumbel(bits).double()
    assert ((noise - exact).abs()[u < 0.99] < 4e-6).all()
    # Near u = 1, where no id wins, fp32 has steps of 6e-8.
    assert ((noise - exact).abs()[u >= 0.99] < 1e-3).all()


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_gumbel_keeps_its_steps_in_both_tails(implementation: str, device: torch.device) -> None:
    gumbel = {"triton": gumbel_triton, "reference": gumbel_reference}[implementation]
    top = gumbel(torch.arange(1000, device=device))
    assert (top.diff() < 0).all()  # the 1000 largest values are all different
    assert top[0].item() == pytest.approx(22.8738, abs=1e-3)  # -log(2**-33)
    bottom = gumbel(torch.arange(2**32 - 1000, 2**32, 7, device=device))
    assert bottom.isfinite().all() and (bottom.diff() <= 0).all()
    assert bottom[-1].item() == pytest.approx(-2.8115, abs=1e-3)  # -log(-log(2**-24))
