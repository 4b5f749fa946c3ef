"""Where rows are cut: kernel against sorting, through every way the kernel can take."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tpllm.sampling import thresholds as cuts
from tpllm.sampling.thresholds import (
    Truncation,
    find_cuts_reference,
    find_cuts_triton,
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


def random_scores(kind: str, parts: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(S, parts, columns, generator=generator)
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
    scores[6] = -torch.inf  # nothing weighs anything
    return scores


def kept(scores: Tensor, cut: Tensor) -> Tensor:
    ids = torch.arange(scores.shape[1] * scores.shape[2], device=scores.device)
    return keys_of(scores.flatten(1), ids) >= cut.unsqueeze(1)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's word in the interpreter
@pytest.mark.parametrize(
    "kind, parts, columns",
    [("steep", 1, 7), ("steep", 3, 60), ("flat", 1, 180), ("tied", 3, 60), ("odd", 3, 60)],
)
@pytest.mark.parametrize("names", [["top_ks"], ["top_ps"], ["top_ks", "top_ps", "min_ps"]])
def test_kernel_keeps_what_sorting_keeps(kind, parts, columns, names, device, monkeypatch) -> None:
    monkeypatch.setattr(cuts, "_TILE", 64)
    monkeypatch.setattr(cuts, "_CAPACITY", 16)  # small, so that intervals must be narrowed
    scores = random_scores(kind, parts, columns).to(device)
    settings: dict[str, Any] = {name: None for name in SETTINGS}
    settings |= {name: SETTINGS[name].to(device) for name in ["temperatures", *names]}
    truncation = Truncation(**settings)
    ours = kept(scores, find_cuts_triton(scores, truncation))
    theirs = kept(scores, find_cuts_reference(scores, truncation))
    different = (ours != theirs).sum(dim=1)
    # float32 may round an exponential so that one token more or less is needed
    assert different.max() <= (1 if "top_ps" in names else 0)
    assert different.sum() <= 1


@pytest.mark.parametrize("kind", ["steep", "tied", "odd"])
@pytest.mark.parametrize("num_tokens", [1, 5, 60])
def test_the_likeliest_tokens_are_gathered_in_order(kind, num_tokens, device, monkeypatch) -> None:
    monkeypatch.setattr(cuts, "_TILE", 64)
    monkeypatch.setattr(cuts, "_GATHER_TILE", 32)
    monkeypatch.setattr(cuts, "_CAPACITY", 16)
    scores = random_scores(kind, 1, 60)[:5, 0].to(device)
    ours = likeliest_triton(scores, num_tokens, 1000)
    assert torch.equal(ours, likeliest_reference(scores, num_tokens, 1000))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.5, 1.3, 5.0])
def test_whole_vocabularies_are_cut_as_by_sorting(scale: float) -> None:
    """Of bfloat16 logits, so with many ties, in all the sizes that the kernel really has."""
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
    ours = kept(scores, find_cuts_triton(scores, truncation))
    theirs = kept(scores, find_cuts_reference(scores, truncation))
    assert (ours != theirs).sum(dim=1).max() <= 1
