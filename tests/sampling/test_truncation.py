"""Top-k, top-p and min-p against transformers, against float64, and split over ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.marks import FOUR_GPUS
from tests.ranks import run_ranks
from tests.sampling.records import sampled_rows
from tpllm.parallel.group import TPGroup
from tpllm.sampling.logprobs import token_logprobs
from tpllm.sampling.sampler import sample
from tpllm.sampling.thresholds import Truncation
from tpllm.sampling.token_order import scores_of
from tpllm.sampling.truncation import drop_below_reference, drop_below_triton, truncate

pytestmark = pytest.mark.usefixtures("poisoned_memory")

V = 4101
# What a chi-square of this many degrees of freedom exceeds once in a thousand times.
CHI_SQUARE_999 = {2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
IDS: Any = None  # transformers' processors ignore it


def random_logits(num_rows: int, device: torch.device | str = "cpu") -> Tensor:
    rng = torch.Generator().manual_seed(num_rows)
    return (3 * torch.randn(num_rows, V, generator=rng)).to(device)


def truncation_of(
    num_rows: int,
    device: torch.device | str = "cpu",
    temperatures: float | list[float] = 1.0,
    **options: Any,
) -> Truncation:
    """Return a truncation of `top_ks`, `top_ps` and `min_ps`, each one value per row or absent."""

    def tensor(name: str, dtype: torch.dtype) -> Tensor | None:
        return torch.tensor(options[name], dtype=dtype, device=device) if name in options else None

    return Truncation(
        torch.tensor(temperatures, device=device).expand(num_rows).contiguous(),
        tensor("top_ks", torch.int32),
        tensor("top_ps", torch.float32),
        tensor("min_ps", torch.float32),
    )


def truncated(logits: Tensor, truncation: Truncation, vocab_size: int = V) -> Tensor:
    """Return scores after truncation on a single rank."""
    scores = scores_of(logits, 0, vocab_size)
    truncate(scores, truncation, 0, TPGroup.single(logits.device))
    return scores


def kept_by_reference(logits: Tensor, temperature: float, k: int, p: float, m: float) -> Tensor:
    """Return which tokens of a row are kept, by the definitions in float64: [V] bool."""
    order = torch.sort(logits.double(), descending=True, stable=True).indices  # ties: lowest first
    probabilities = torch.softmax(logits.double() / temperature, dim=0)[order]
    kept = probabilities >= m * probabilities[0]
    kept &= torch.arange(len(order)) < (k or len(order))
    probabilities = probabilities * kept / (probabilities * kept).sum()
    if p < 1:
        kept &= probabilities.cumsum(0) - probabilities < p
    return torch.zeros(len(order), dtype=torch.bool).scatter_(0, order, kept)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_each_threshold_is_that_of_transformers(temperature: float) -> None:
    from transformers.generation import logits_process as theirs

    logits = random_logits(6)
    scaled = logits / temperature
    checks: list[tuple[dict[str, Any], Any, list[float]]] = [
        ({"top_ks": [1, 2, 5, 50, 4100, V]}, theirs.TopKLogitsWarper, [1, 2, 5, 50, 4100, V]),
        (
            {"top_ps": [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999]},
            theirs.TopPLogitsWarper,
            [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999],
        ),
        (
            {"min_ps": [1.0, 0.5, 0.1, 0.05, 0.01, 1e-4]},
            theirs.MinPLogitsWarper,
            [1.0, 0.5, 0.1, 0.05, 0.01, 1e-4],
        ),
    ]
    for options, warper, values in checks:
        ours = truncated(logits, truncation_of(6, temperatures=temperature, **options))
        for row, value in enumerate(values):
            expected = warper(value)(IDS, scaled[row : row + 1])[0]
            assert torch.equal(ours[row] > -torch.inf, expected > -torch.inf)
            kept = ours[row] > -torch.inf
            assert torch.equal(ours[row][kept], logits[row][kept])  # kept scores do not change


def test_thresholds_together_follow_the_definitions_in_float64() -> None:
    rng = torch.Generator().manual_seed(0)
    settings = [
        (float(t), k, float(p), float(m))
        for t, p, m in zip(
            torch.rand(24, generator=rng) * 2 + 0.1,
            torch.rand(24, generator=rng),
            torch.rand(24, generator=rng) ** 6,
            strict=True,
        )
        for k in (0, 3, 40)
    ]
    logits = random_logits(len(settings)).mul(4).round() / 4  # with many ties
    temperatures, top_ks, top_ps, min_ps = (list(each) for each in zip(*settings, strict=True))
    options: dict[str, Any] = {"top_ks": top_ks, "top_ps": top_ps, "min_ps": min_ps}
    ours = truncated(logits, truncation_of(len(settings), temperatures=temperatures, **options))
    for row, setting in enumerate(settings):
        expected = kept_by_reference(logits[row], *setting)
        different = (ours[row] > -torch.inf) != expected
        # float32 may differ from float64 by one token at the threshold
        assert different.sum() <= (1 if setting[2] < 1 else 0), setting


def test_of_equal_logits_the_lower_ids_are_kept(device: torch.device) -> None:
    logits = torch.zeros(4, V, device=device)
    options: dict[str, Any] = {"top_ks": [1, 7, 0, 0], "top_ps": [1.0, 1.0, 10 / V - 1e-6, 1.0]}
    ours = truncated(logits, truncation_of(4, device, **options))
    kept = [(row > -torch.inf).nonzero().flatten().tolist() for row in ours]
    assert kept == [[0], list(range(7)), list(range(10)), list(range(V))]


def test_rows_without_truncation_do_not_change(device: torch.device) -> None:
    logits = random_logits(3, device)
    options: dict[str, Any] = {
        "top_ks": [0, 5, 0],
        "top_ps": [1.0, 1.0, 0.5],
        "min_ps": [0.0, 0.0, 0.0],
    }
    ours = truncated(logits, truncation_of(3, device, [1.0, 0.5, 1.0], **options))
    assert torch.equal(ours[0], logits[0])
    assert (ours[1] > -torch.inf).sum() == 5


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e6])
def test_extreme_temperatures_keep_at_least_one_token(
    temperature: float, device: torch.device
) -> None:
    logits = random_logits(3, device)
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    options: dict[str, Any] = {"top_ks": [9, 9, 9], "top_ps": [0.5] * 3, "min_ps": [0.1] * 3}
    ours = truncated(logits, truncation_of(3, device, temperature, **options))
    assert ours[0].max() == logits[0].max()
    assert ours[1, 5] == torch.inf
    assert not ours.isnan().any()


def test_padding_is_never_among_the_likeliest(device: torch.device) -> None:
    logits = random_logits(2, device)
    logits[:, 100:] = 1e4
    ours = truncated(logits, truncation_of(2, device, top_ks=[200, 3]), vocab_size=100)
    assert torch.equal(ours[0, :100], logits[0, :100])
    assert (ours[:, 100:] == -torch.inf).all()
    assert (ours[1] > -torch.inf).sum() == 3


def test_kernel_and_reference_drop_the_same(device: torch.device) -> None:
    ours = scores_of(random_logits(3, device), 0, V)
    theirs = ours.clone()
    threshold = torch.tensor([0, 2**50, -(2**49)], device=device)
    drop_below_triton(ours, threshold, 7)
    drop_below_reference(theirs, threshold, 7)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"top_ks": [4]}, {"top_ps": [0.8]}, {"min_ps": [0.2]}, {}], ids=str
)
def test_samples_follow_the_truncated_distribution(options: dict[str, list[float]]) -> None:
    """Compare the chi-square of 4,000 samples of fixed seeds with the critical value at 0.1 %."""
    num_samples, temperature = 4000, 1.4
    logits = torch.tensor([2.0, 1.5, 1.4, 0.9, 0.5, 0.2, -0.5, -2.0])
    repeated: dict[str, Any] = {name: values * num_samples for name, values in options.items()}
    truncation = truncation_of(num_samples, temperatures=temperature, **repeated)
    scores = truncated(logits.expand(num_samples, -1), truncation, vocab_size=8)
    ones = torch.ones(num_samples, dtype=torch.int32)
    seeds = torch.arange(num_samples).numpy() + 2**32
    batch = sampled_rows(ones, temperature=temperature, seed=seeds)
    sampled_ids = sample(scores, batch, 0, 8, TPGroup.single(torch.device("cpu")))
    counts = torch.bincount(sampled_ids.long(), minlength=8).double()
    kept = kept_by_reference(
        logits,
        temperature,
        int(options.get("top_ks", [0])[0]),
        options.get("top_ps", [1.0])[0],
        options.get("min_ps", [0.0])[0],
    )
    assert counts[~kept].sum() == 0
    expected = torch.softmax(logits.double()[kept] / temperature, dim=0) * num_samples
    statistic = ((counts[kept] - expected) ** 2 / expected).sum().item()
    assert statistic < CHI_SQUARE_999[int(kept.sum()) - 1]


def shards_agree_with_one_rank(tp: TPGroup, num_rows: int) -> None:
    """Compare thresholds, samples and log-probabilities on logits with many ties over the ranks."""
    logits = (random_logits(num_rows) * 2).round().div(2).to(tp.device)
    truncation = truncation_of(
        num_rows,
        tp.device,
        ([0.7, 1.0, 1.3] * 4)[:num_rows],
        top_ks=([0, 1, 8, 500] * 3)[:num_rows],
        top_ps=([1.0, 0.9, 0.3, 0.99, 0.8, 1.0] * 2)[:num_rows],
        min_ps=([0.0, 0.0, 0.01, 0.3] * 3)[:num_rows],
    )
    ones = torch.ones(num_rows, dtype=torch.int32, device=tp.device)
    batch = sampled_rows(
        ones,
        temperature=truncation.temperatures.cpu().numpy(),
        seed=ones.cumsum(0).cpu().numpy() + 2**32,
    )
    alone = TPGroup.single(tp.device)
    local_size = -(-V // tp.size)
    start = tp.rank * local_size
    padded = torch.cat([logits, logits.new_full((num_rows, local_size * tp.size - V), 99.0)], dim=1)
    shard = padded[:, start : start + local_size]
    token_ids = torch.arange(0, V, V // num_rows, device=tp.device)[:num_rows].int()

    whole, ours = scores_of(logits, 0, V), scores_of(shard, start, V)
    assert torch.equal(
        token_logprobs(ours, token_ids, 20, start, tp),
        token_logprobs(whole, token_ids, 20, 0, alone),
    )
    truncate(whole, truncation, 0, alone)
    truncate(ours, truncation, start, tp)
    end = min(V, start + local_size)
    assert torch.equal(ours[:, : end - start], whole[:, start:end])
    assert torch.equal(sample(ours, batch, start, V, tp), sample(whole, batch, 0, V, alone))


@pytest.mark.parametrize("world_size, num_rows", [(2, 12), (4, 12), (2, 1), (4, 9)])
def test_shards_agree_with_one_rank(world_size: int, num_rows: int) -> None:
    run_ranks(shards_agree_with_one_rank, world_size, num_rows)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=FOUR_GPUS)])
def test_shards_on_gpus_agree_with_one_rank(world_size: int) -> None:
    run_ranks(shards_agree_with_one_rank, world_size, 12, device="cuda")
