"""Masks of tokens: every slice of a vocabulary keeps the ids whose bits are set."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tpllm.sampling.token_masks import MASK_BITS, keep_masked_reference, keep_masked_triton

VOCAB_SIZE = 5003  # neither whole words nor whole tiles


def masks(num_rows: int) -> tuple[Tensor, Tensor]:
    """Return which ids are allowed, [num_rows, V] bool, and the same as words."""
    allowed = np.random.default_rng(0).random((num_rows, VOCAB_SIZE)) < 0.3
    padded = np.pad(allowed, ((0, 0), (0, -VOCAB_SIZE % MASK_BITS)))
    words = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    return torch.from_numpy(allowed), torch.from_numpy(words)


@pytest.mark.parametrize("keep", [keep_masked_reference, keep_masked_triton])
@pytest.mark.parametrize(
    "start, end", [(0, 5003), (0, 2502), (2502, 5004), (4996, 5003), (33, 34), (5024, 5060)]
)
def test_a_slice_keeps_the_ids_of_its_mask(keep, start, end, device):
    allowed, words = masks(2)
    scores = torch.randn(4, end - start + 5, device=device)[:, : end - start]  # rows strided
    before = scores.clone()
    first = start // MASK_BITS
    here = words[:, first : -(-end // MASK_BITS)].contiguous().to(device)
    keep(scores, torch.tensor([3, 1], device=device), here, start - first * MASK_BITS)
    assert torch.equal(scores[[0, 2]], before[[0, 2]])  # without masks
    padded = torch.zeros(2, max(end, VOCAB_SIZE), dtype=torch.bool)
    padded[:, :VOCAB_SIZE] = allowed
    for row, kept in zip((3, 1), padded[:, start:end].to(device), strict=True):
        assert torch.equal(scores[row], before[row].masked_fill(~kept, -torch.inf))
