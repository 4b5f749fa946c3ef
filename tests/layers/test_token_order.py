import pytest
import torch
from torch import Tensor

from tpllm.layers.token_order import (
    LOWEST_KEY,
    UNIT,
    keys_of,
    logits_and_ids,
    scores_of,
    scores_of_reference,
    scores_of_triton,
    token_sums_reference,
    token_sums_triton,
    with_spare_column,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # a logit over a tiny temperature is -inf, as it should be; numpy, under the interpreter, tells
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

LARGEST = torch.finfo(torch.float32).max


def scores_and_points(
    num_rows: int, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits with ties and infinities, and points: every token's, none's, and two in between."""
    rng = torch.Generator().manual_seed(vocab_size)
    logits = (8 * torch.randn(num_rows, vocab_size, generator=rng)).round() / 2
    logits[:, vocab_size // 2] = -torch.inf
    scores = scores_of(logits.to(device), 0, vocab_size)
    ids = torch.arange(vocab_size, device=device)
    keys = keys_of(scores, ids)
    in_between = keys[:, [0, vocab_size - 1]]
    ends = keys.new_tensor([LOWEST_KEY, -LOWEST_KEY]).expand(num_rows, 2)
    return scores, torch.cat([ends, in_between], dim=1)


def test_keys_order_by_logit_then_by_falling_id() -> None:
    logits = torch.tensor([-torch.inf, -LARGEST, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, LARGEST])
    keys = keys_of(logits, torch.tensor([5, 0, 7, 7, 3, 2, 9, 2**20 - 1, 0]))
    assert keys.tolist() == sorted(keys.tolist())
    assert len(set(keys.tolist())) == len(keys)
    assert keys.min() >= LOWEST_KEY and keys.max() < -LOWEST_KEY


def test_a_key_gives_its_logit_and_id_back() -> None:
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


def test_all_rows_are_copied_where_none_is_named(device: torch.device) -> None:
    logits = torch.randn(3, 5000, device=device).half()
    assert torch.equal(scores_of(logits, 0, 5000), logits.float())


@pytest.mark.parametrize("num_rows, vocab_size", [(1, 1), (3, 300), (1, 8300)])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_and_reference_sums_are_equal(
    num_rows: int, vocab_size: int, weighted: bool, device: torch.device
) -> None:
    scores, points = scores_and_points(num_rows, vocab_size, device)
    temperatures = torch.tensor([0.7, 1e-38, 1e6], device=device)[:num_rows]
    weights_of = (scores.amax(dim=1), temperatures) if weighted else None
    ours = token_sums_triton(scores, 0, weights_of)(points)
    exact = token_sums_reference(scores, 0, weights_of)(points)
    if weighted:  # the kernel's exponential is float32
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-6, atol=0)
    else:
        assert torch.equal(ours, exact)


def test_sums_of_slices_add_up_exactly(device: torch.device) -> None:
    scores, points = scores_and_points(3, 1000, device)
    weights_of = (scores.amax(dim=1), torch.full((3,), 1.3, device=device))
    whole = token_sums_triton(scores, 0, weights_of)(points)
    parts = [
        token_sums_triton(scores[:, a:b], a, weights_of)(points)
        for a, b in ((0, 1), (1, 500), (500, 1000))
    ]
    assert torch.equal(torch.stack(parts).sum(dim=0), whole)
    probability = torch.softmax(scores.double() / 1.3, dim=1).amax(dim=1)
    torch.testing.assert_close(whole[:, 0].double(), UNIT / probability, rtol=1e-6, atol=0)


@pytest.mark.parametrize("logit", [-torch.inf, torch.inf, LARGEST, -LARGEST])
def test_extreme_logits_still_give_sums(logit: float, device: torch.device) -> None:
    scores = torch.full((1, 40), logit, device=device)
    points = torch.full((1, 1), LOWEST_KEY, device=device)
    weights_of = (scores.amax(dim=1), torch.full((1,), 0.5, device=device))
    total = token_sums_triton(scores, 0, weights_of)(points)
    assert torch.equal(total, token_sums_reference(scores, 0, weights_of)(points))
    assert total.item() == (0 if logit == -torch.inf else 40 * UNIT)
