import pytest
import torch
from torch import Tensor

from tpllm.sampling.token_order import (
    LOWEST_KEY,
    UNIT,
    keys_of,
    logits_and_ids,
    rank_and_mass_reference,
    rank_and_mass_triton,
    scores_of,
    scores_of_reference,
    scores_of_triton,
    with_spare_column,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # a logit divided by a tiny temperature is -inf, as intended; numpy warns in the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

LARGEST = torch.finfo(torch.float32).max


def scores_with_ties(num_rows: int, vocab_size: int, device: torch.device) -> Tensor:
    rng = torch.Generator().manual_seed(vocab_size)
    logits = (8 * torch.randn(num_rows, vocab_size, generator=rng)).round() / 2
    logits[:, vocab_size // 2] = -torch.inf
    return scores_of(logits.to(device), 0, vocab_size)


def test_keys_order_by_logit_then_by_falling_id() -> None:
    logits = torch.tensor([-torch.inf, -LARGEST, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, LARGEST])
    keys = keys_of(logits, torch.tensor([5, 0, 7, 7, 3, 2, 9, 2**20 - 1, 0]))
    assert keys.tolist() == sorted(keys.tolist())
    assert len(set(keys.tolist())) == len(keys)
    assert keys.min() >= LOWEST_KEY and keys.max() < -LOWEST_KEY


def test_logits_and_ids_inverts_keys_of() -> None:
    logits = torch.tensor([-torch.inf, -3.5, 0.0, 1e-40, 7.25, torch.inf])
    ids = torch.tensor([0, 1, 151_935, 2**20 - 1, 5, 6])
    back, ids_back = logits_and_ids(keys_of(logits, ids))
    assert torch.equal(back, logits)
    assert torch.equal(ids_back, ids.int())


@pytest.mark.parametrize("copy", [scores_of_triton, scores_of_reference])
def test_scores_are_a_copy_without_padding_and_nan(copy, device: torch.device) -> None:
    logits = torch.tensor([[1.0, torch.nan, 3.0, 4.0], [5.0, 6.0, torch.inf, 8.0], [9.0] * 4])
    logits = logits.half().to(device)
    rows = torch.tensor([1, 0], device=device)
    scores = copy(logits, 10, 13, rows)
    assert scores.tolist() == [[5, 6, torch.inf, -torch.inf], [1, -torch.inf, 3, -torch.inf]]
    assert scores.dtype == torch.float32
    memory = with_spare_column(scores)
    assert memory.shape[1] > scores.shape[1]
    assert (memory[:, scores.shape[1] :] == -torch.inf).all()
    scores.fill_(0)
    assert logits[0, 0] == 1


def test_all_rows_are_copied_without_a_selection(device: torch.device) -> None:
    logits = torch.randn(3, 5000, device=device).half()
    assert torch.equal(scores_of(logits, 0, 5000), logits.float())


@pytest.mark.parametrize("num_rows, vocab_size", [(1, 2), (3, 300), (2, 8300)])
def test_rank_and_mass_are_those_of_the_sorted_row(num_rows, vocab_size, device) -> None:
    scores = scores_with_ties(num_rows, vocab_size, device)
    largest = scores.amax(dim=1)
    keys = keys_of(scores, torch.arange(vocab_size, device=device))
    for col in (0, vocab_size // 2, vocab_size - 1):
        key = keys[:, col].contiguous()
        ours = rank_and_mass_triton(scores, key, largest, 0)
        exact = rank_and_mass_reference(scores, key, largest, 0)
        assert torch.equal(ours[:, 0], exact[:, 0])
        in_order = keys.sort(dim=1, descending=True).values
        assert torch.equal(in_order.gather(1, ours[:, :1] - 1).squeeze(1), key)
        # the kernel's exponential is float32
        torch.testing.assert_close(ours[:, 1].double(), exact[:, 1].double(), rtol=1e-6, atol=0)
    probability = torch.softmax(scores.double(), dim=1).amax(dim=1)
    torch.testing.assert_close(ours[:, 1].double(), UNIT / probability, rtol=1e-6, atol=0)


def test_rank_and_mass_of_slices_add_up_exactly(device: torch.device) -> None:
    scores = scores_with_ties(3, 1000, device)
    largest, keys = scores.amax(dim=1), keys_of(scores[:, 700], torch.tensor(700, device=device))
    whole = rank_and_mass_triton(scores, keys, largest, 0)
    parts = [
        rank_and_mass_triton(scores[:, a:b], keys, largest, a)
        for a, b in ((0, 1), (1, 500), (500, 1000))
    ]
    assert torch.equal(torch.stack(parts).sum(dim=0), whole)


@pytest.mark.parametrize("logit", [-torch.inf, torch.inf, LARGEST, -LARGEST])
def test_extreme_logits_still_have_a_mass(logit: float, device: torch.device) -> None:
    scores = torch.full((1, 40), logit, device=device)
    lowest = torch.tensor([LOWEST_KEY], device=device)
    total = rank_and_mass_triton(scores, lowest, scores.amax(dim=1), 0)
    assert total.tolist() == [[40, 0 if logit == -torch.inf else 40 * int(UNIT)]]
