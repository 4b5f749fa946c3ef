"""Changes to single logits, against transformers' processors and vLLM's definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tpllm.sampling.logit_changes import add_at, ends_with, keep_only, penalize
from tpllm.sampling.token_order import scores_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

V = 50


def random_scores(
    num_rows: int, device: torch.device, vocab_start: int = 0, size: int = V
) -> Tensor:
    """Return a slice of random logits, which do not depend on the slice."""
    rng = torch.Generator().manual_seed(num_rows)
    logits = 3 * torch.randn(num_rows, V, generator=rng)
    return scores_of(logits[:, vocab_start : vocab_start + size].to(device), vocab_start, V)


def int64(device: torch.device, values: list[int]) -> Tensor:
    return torch.tensor(values, device=device)


def test_values_are_added_at_their_entries_only(device: torch.device) -> None:
    scores = random_scores(3, device)
    expected = scores.clone()
    slots, cols = int64(device, [0, 2, -1, 2]), int64(device, [0, 49, 7, 3])
    add_at(scores, slots, cols, torch.tensor([1.5, -2.0, 99.0, -torch.inf], device=device))
    expected[0, 0] += 1.5
    expected[2, 49] += -2
    expected[2, 3] = -torch.inf
    assert torch.equal(scores, expected)


def test_a_banned_id_stays_banned_when_values_are_added(device: torch.device) -> None:
    scores = random_scores(1, device)
    where = int64(device, [0]), int64(device, [5])
    add_at(scores, *where, -torch.inf)
    add_at(scores, *where, 100.0)
    assert scores[0, 5] == -torch.inf


def test_only_allowed_ids_remain_in_the_rows_that_have_some(device: torch.device) -> None:
    scores = random_scores(3, device)
    expected = torch.full_like(scores, -torch.inf)
    expected[1] = scores[1]  # has no allowed ids
    expected[0, [3, 4]] = scores[0, [3, 4]]
    slots, cols = int64(device, [0, -1, 0]), int64(device, [4, 9, 3])
    keep_only(scores, int64(device, [0, 2]), slots, cols)  # row 2's ids are on other ranks
    assert torch.equal(scores, expected)


def test_a_bad_word_matches_only_within_the_generated_tokens(device: torch.device) -> None:
    tokens = torch.tensor(
        [[9, 9, 1, 2, 3, 0], [1, 2, 3, 0, 0, 0]], dtype=torch.int32, device=device
    )
    words = torch.tensor(  # last token first
        [[3, 2, -1], [3, 2, 1], [3, 1, -1], [-1, -1, -1], [3, -1, -1], [3, 2, 1], [3, 2, 9]],
        dtype=torch.int32,
        device=device,
    )
    rows = int64(device, [0, 0, 0, 0, 1, 1, 0])
    lengths = int64(device, [5, 5, 5, 5, 3, 3, 5])
    prompt_lengths = int64(device, [2, 2, 2, 2, 2, 1, 2])
    found = ends_with(tokens, rows, lengths, prompt_lengths, words)
    assert found.tolist() == [True, True, False, True, True, False, False]


def vllm_penalties(
    logits: Tensor, tokens: list[int], num_prompt: int, repetition: float, freq: float, pres: float
) -> Tensor:
    """Penalize one row in float64, by vLLM's definitions."""
    out = logits.double().clone()
    for token in set(tokens):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token in set(tokens[num_prompt:]):
        out[token] -= freq * tokens[num_prompt:].count(token) + pres
    return out


@pytest.mark.parametrize("num_shards", [1, 2])
def test_penalties_follow_their_definitions(num_shards: int, device: torch.device) -> None:
    rng = torch.Generator().manual_seed(0)
    histories = [torch.randint(0, V, (n,), generator=rng).tolist() for n in (1, 7, 30, 12)]
    num_prompt = [1, 3, 10, 12]
    values = [[1.3, 0.5, 0.25], [0.7, -2.0, 2.0], [1.0, 0.5, -0.5], [2.0, 1.0, 1.0]]
    rows = [3, 0, 4, 1]  # row 2 has no penalties
    table = torch.full((4, 31), 10**6, dtype=torch.int32)  # unused entries hold invalid tokens
    for i, history in enumerate(histories):
        table[i, : len(history)] = torch.tensor(history, dtype=torch.int32)
    for start in range(0, V, V // num_shards):
        size = V // num_shards
        scores = random_scores(5, device, start, size)
        before = random_scores(5, torch.device("cpu"))
        penalize(
            scores,
            int64(device, rows),
            table.to(device),
            int64(device, [len(history) for history in histories]),
            int64(device, num_prompt),
            torch.tensor(values, device=device),
            start,
        )
        expected = before.double().clone()
        for i, row in enumerate(rows):
            expected[row] = vllm_penalties(before[row], histories[i], num_prompt[i], *values[i])
        torch.testing.assert_close(
            scores.cpu().double(), expected[:, start : start + size], rtol=1e-6, atol=1e-6
        )


def test_repetition_penalty_and_bad_words_are_those_of_transformers() -> None:
    from transformers.generation import logits_process as theirs

    cpu = torch.device("cpu")
    history = [7, 3, 7, 11, 4]
    ids: Any = torch.tensor([history])
    scores = random_scores(1, cpu)
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.4)(ids, scores.clone())
    no_prompt, penalties = int64(cpu, [0]), torch.tensor([[1.4, 0.0, 0.0]])
    tokens = torch.tensor([history], dtype=torch.int32)
    penalize(scores, int64(cpu, [0]), tokens, int64(cpu, [5]), no_prompt, penalties, 0)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)

    bad_words = [[9], [4, 12], [11, 4, 13], [7, 4, 14], [3, 15]]
    scores = random_scores(1, cpu)
    eos: Any = 49
    expected = theirs.NoBadWordsLogitsProcessor(bad_words, eos)(ids, scores.clone())
    words = torch.tensor([[-1, -1], [4, -1], [4, 11], [4, 7], [3, -1]], dtype=torch.int32)
    zeros = torch.zeros(5, dtype=torch.int64)
    found = ends_with(tokens, zeros, zeros + 5, zeros, words)
    last = int64(cpu, [9, 12, 13, 14, 15])
    add_at(scores, zeros.masked_fill(~found, -1), last, -torch.inf)
    assert torch.equal(scores, expected)
    assert (scores == -torch.inf).sum() == 3
