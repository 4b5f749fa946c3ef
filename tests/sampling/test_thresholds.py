"""Thresholds of rows: the kernel against sorting, through every path of the kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tpllm.sampling import thresholds
from tpllm.sampling.thresholds import (
    Truncation,
    find_thresholds_reference,
    find_thresholds_triton,
    likeliest_reference,
    likeliest_triton,
)
from tpllm.sampling.token_order import keys_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

S = 8
SETTINGS = {
    "temperatures": torch.tensor([0.7, 1.0, 1.3, 0.0, 1e-38, 5.0, 0.6, 1.0]),
    "top_ks": torch.tensor([0, 1, 8, 300, 2, 40, 20, 10_000], dtype=torch.int32),
    "top_ps": torch.tensor([1.0, 0.9, 0.3, 0.99, 0.8, 1e-6, 0.95, 1.0]),
    "min_ps": torch.tensor([0.0, 0.0, 0.01, 0.3, 0.0, 1.0, 0.0, 1e-4]),
}


def random_scores(kind: str, shards: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(S, shards, columns, generator=generator)
    if kind == "steep":
        return 4 * scores
    if kind == "flat":
        return scores / 100
    if kind == "tied":
        return (2 * scores).round()
    assert kind == "odd"
    scores[0] = -torch.inf
    scores[1, :, 3:] = -torch.inf
    scores[2, 0, 4] = torch.inf
    scores[3] = 0.0
    scores[4, 0] = 1e38 * scores[4, 0]
    scores[6] = -torch.inf  # all weights are 0
    return scores


def kept(scores: Tensor, threshold: Tensor) -> Tensor:
    ids = torch.arange(scores.shape[1] * scores.shape[2], device=scores.device)
    return keys_of(scores.flatten(1), ids) >= threshold.unsqueeze(1)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy warns in Triton's interpreter
@pytest.mark.parametrize(
    "kind, shards, columns",
    [("steep", 1, 7), ("steep", 3, 60), ("flat", 1, 180), ("tied", 3, 60), ("odd", 3, 60)],
)
@pytest.mark.parametrize("names", [["top_ks"], ["top_ps"], ["top_ks", "top_ps", "min_ps"]])
def test_kernel_keeps_what_sorting_keeps(kind, shards, columns, names, device, monkeypatch) -> None:
    monkeypatch.setattr(thresholds, "_TILE", 64)
    monkeypatch.setattr(thresholds, "_CAPACITY", 16)  # small, so that the kernel narrows intervals
    scores = random_scores(kind, shards, columns).to(device)
    settings: dict[str, Any] = {name: None for name in SETTINGS}
    settings |= {name: SETTINGS[name].to(device) for name in ["temperatures", *names]}
    truncation = Truncation(**settings)
    ours = kept(scores, find_thresholds_triton(scores, truncation))
    theirs = kept(scores, find_thresholds_reference(scores, truncation))
    different = (ours != theirs).sum(dim=1)
    # float32 may round an exponential so that one token more or less is needed
    assert different.max() <= (1 if "top_ps" in names else 0)
    assert different.sum() <= 1


@pytest.mark.parametrize("kind", ["steep", "tied", "odd"])
@pytest.mark.parametrize("num_tokens", [1, 5, 60])
def test_the_likeliest_tokens_are_gathered_in_order(kind, num_tokens, device, monkeypatch) -> None:
    monkeypatch.setattr(thresholds, "_TILE", 64)
    monkeypatch.setattr(thresholds, "_GATHER_TILE", 32)
    monkeypatch.setattr(thresholds, "_CAPACITY", 16)
    scores = random_scores(kind, 1, 60)[:5, 0].to(device)
    ours = likeliest_triton(scores, num_tokens, 1000)
    assert torch.equal(ours, likeliest_reference(scores, num_tokens, 1000))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.5, 1.3, 5.0])
def test_thresholds_of_whole_vocabularies_equal_those_of_sorting(scale: float) -> None:
    """bfloat16 logits have many ties; the kernel runs with its real sizes."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(64, 1, 151_936, generator=generator, device=device)
    scores = (scale * logits).bfloat16().float()
    rows = torch.arange(64, device=device)
    truncation = Truncation(
        0.3 + rows / 50,
        (rows * rows * 5).int() * (rows % 3 > 0),
        (1 - 0.02 * (rows % 30)).float(),
        0.01 * (rows % 5 == 0).float(),
    )
    ours = kept(scores, find_thresholds_triton(scores, truncation))
    theirs = kept(scores, find_thresholds_reference(scores, truncation))
    assert (ours != theirs).sum(dim=1).max() <= 1
