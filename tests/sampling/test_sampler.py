from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.sampling.records import sampled_rows
from tpllm.channel.row_record import MAX_STOP_IDS, column
from tpllm.parallel.group import TPGroup
from tpllm.sampling import sampler
from tpllm.sampling.gumbel import gumbel_reference, noise_bits_reference
from tpllm.sampling.row_table import SampledRows
from tpllm.sampling.sampler import (
    Subset,
    best_candidate_reference,
    best_candidate_triton,
    local_candidates_reference,
    local_candidates_triton,
    sample,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Where = tuple[torch.device, torch.dtype]
Stages = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]


@pytest.fixture(
    params=[
        (local_candidates_triton, best_candidate_triton),
        (local_candidates_reference, best_candidate_reference),
    ],
    ids=["triton", "reference"],
)
def stages(request: pytest.FixtureRequest) -> Stages:
    """Return the two stages of sampling: best of each tile of a slice, best of candidates."""
    param: Stages = request.param
    return param


def make_batch(
    num_rows: int,
    device: torch.device,
    temperatures: list[float] | float = 1.0,
    min_positions: list[int] | int = 0,
    stop_ids: list[list[int]] | None = None,
) -> SampledRows:
    """Return rows with random seeds and positions; no stop ids by default."""
    rng = torch.Generator().manual_seed(num_rows)
    seeds = torch.randint(-(2**31), 2**31, (num_rows, 2), generator=rng).int().numpy()
    positions = torch.randint(1, 5000, (num_rows,), generator=rng).int().to(device)
    padded = [each + [-1] * (MAX_STOP_IDS - len(each)) for each in stop_ids or [[]] * num_rows]
    return sampled_rows(
        positions,
        temperature=temperatures,
        seed=seeds.view("<u8")[:, 0],
        min_position=min_positions,
        stop_ids=padded,
    )


def random_logits(num_rows: int, vocab_size: int, where: Where) -> Tensor:
    device, dtype = where
    rng = torch.Generator().manual_seed(num_rows * 100_000 + vocab_size)
    return (4 * torch.randn(num_rows, vocab_size, generator=rng)).to(device, dtype)


def sample_through(stages: Stages, logits: Tensor, batch: SampledRows) -> list[int]:
    """Sample from the whole vocabulary through the given stages."""
    local_candidates, best_candidate = stages
    return best_candidate(local_candidates(logits, batch, 0, logits.shape[1]))[1].tolist()


def shards_of(logits: Tensor, world_size: int) -> list[Tensor]:
    """Split logits into slices [S, ceil(V / world_size)]; padding is +inf."""
    num_rows, vocab_size = logits.shape
    local_size = -(-vocab_size // world_size)
    padding = logits.new_full((num_rows, local_size * world_size - vocab_size), torch.inf)
    return list(torch.cat([logits, padding], dim=1).split(local_size, dim=1))


@pytest.mark.parametrize("num_rows, vocab_size", [(1, 1), (1, 7), (5, 2048), (3, 4999)])
def test_the_sampled_id_has_the_highest_noisy_score(
    stages: Stages, num_rows: int, vocab_size: int, device_and_dtype: Where
) -> None:
    logits = random_logits(num_rows, vocab_size, device_and_dtype)
    temperatures = [0.0, 0.7, 1.0, 1.9, 0.2][:num_rows]
    batch = make_batch(num_rows, logits.device, temperatures)
    noise = gumbel_reference(
        noise_bits_reference(batch.column("seed"), batch.positions, 0, vocab_size)
    )
    scores = logits.float() + batch.column("temperature")[:, None] * noise

    ids = torch.tensor(sample_through(stages, logits, batch), device=logits.device)

    # Either of two scores that differ only by rounding may win.
    sampled_scores = scores.gather(1, ids[:, None]).squeeze(1)
    assert (scores.amax(dim=1) - sampled_scores < 1e-4).all()


def test_kernel_and_reference_candidates_are_equal(device_and_dtype: Where) -> None:
    logits = random_logits(4, 3000, device_and_dtype)
    batch = make_batch(
        4,
        logits.device,
        [0.0, 1.0, 0.5, 2.0],
        [9999, 9999, 0, 0],
        [[1, -1], [2, 7], [3, 4], [5, 6]],
    )
    for vocab_start in (0, 3, 998, 3000):
        args = (logits, batch, vocab_start, vocab_start + 2990)
        best = best_candidate_triton(local_candidates_triton(*args))
        expected = best_candidate_reference(local_candidates_reference(*args))
        assert torch.equal(best[1], expected[1])
        torch.testing.assert_close(best[0].view(torch.float32), expected[0].view(torch.float32))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("vocab_size", [5, 4101])
def test_shards_combined_sample_what_one_rank_samples(
    world_size: int,
    vocab_size: int,
    stages: Stages,
    device_and_dtype: Where,
) -> None:
    local_candidates, best_candidate = stages
    logits = random_logits(4, vocab_size, device_and_dtype)
    batch = make_batch(4, logits.device, [0.0, 0.4, 1.0, 1.5])
    shards = shards_of(logits, world_size)
    best_of_ranks = [
        best_candidate(local_candidates(shard, batch, rank * shard.shape[1], vocab_size))
        for rank, shard in enumerate(shards)
    ]
    combined = best_candidate(torch.stack(best_of_ranks))
    assert combined[1].tolist() == sample_through(stages, logits, batch)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sample_gathers_one_pair_a_row_and_agrees_on_every_rank(
    world_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size = 1001
    logits = random_logits(5, vocab_size, (device, torch.float32))
    batch = make_batch(5, device, [0.0, 0.4, 1.0, 1.0, 2.0])
    shards = shards_of(logits, world_size)
    ranks = [TPGroup(rank, world_size, device, None) for rank in range(world_size)]
    sent: list[Tensor] = []

    def sample_on(rank: int, all_gather: Callable[[Tensor, TPGroup], Tensor]) -> Tensor:
        monkeypatch.setattr(sampler, "all_gather", all_gather)
        shard = shards[rank]
        return sample(shard, batch, rank * shard.shape[1], vocab_size, ranks[rank])

    def send(x: Tensor, tp: TPGroup) -> Tensor:
        sent.append(x)
        return x.expand(tp.size, *x.shape).contiguous()

    for rank in range(world_size):
        sample_on(rank, send)
    assert [tuple(x.shape) for x in sent] == [(2, 5)] * world_size
    sampled_ids = [
        sample_on(rank, lambda x, tp: torch.stack(sent)).tolist() for rank in range(world_size)
    ]
    alone = sample(logits, batch, 0, vocab_size, TPGroup.single(device))
    assert sampled_ids == [alone.tolist()] * world_size


def test_one_rank_does_not_communicate(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sampler, "all_gather")
    logits = random_logits(3, 50, (device, torch.float32))
    ids = sample(logits, make_batch(3, device), 0, 50, TPGroup.single(device))
    assert ids.dtype == torch.int32 and ids.shape == (3,) and ids.is_contiguous()


def test_ties_go_to_the_lowest_id(stages: Stages, device: torch.device) -> None:
    logits = torch.zeros(3, 5000, device=device)
    logits[1, [4100, 17, 3000]] = 2.0
    logits[2] = -torch.inf
    assert sample_through(stages, logits, make_batch(3, device, 0.0)) == [0, 17, 0]


def test_ties_between_candidates_go_to_the_lowest_id(stages: Stages, device: torch.device) -> None:
    scores = torch.tensor([[1.0, -torch.inf, 2.0], [1.0, -torch.inf, 3.0], [0.5, 0.0, 3.0]])
    ids = torch.tensor([[9, 1, 2], [4, 0, 8], [1, 5, 7]], dtype=torch.int32)
    candidates = torch.stack([scores.view(torch.int32), ids], dim=1).to(device)
    best = stages[1](candidates)
    assert best[1].tolist() == [4, 5, 7]
    assert best[0].view(torch.float32).tolist() == [1.0, 0.0, 3.0]


def test_padded_ids_are_never_sampled(stages: Stages, device: torch.device) -> None:
    local_candidates, best_candidate = stages
    logits = torch.full((2, 40), torch.inf, device=device)
    logits[:, :3] = -torch.inf  # even where the real ids are all impossible
    batch = make_batch(2, device, [0.0, 1.0])
    best = best_candidate(local_candidates(logits, batch, 20, 23))
    assert best[1].tolist() == [20, 20]
    padding_alone = best_candidate(local_candidates(logits, batch, 60, 23))
    combined = best_candidate(torch.stack([best, padding_alone]))
    assert combined[1].tolist() == [20, 20]


@pytest.mark.parametrize("vocab_start", [0, 1, 6, 2051])
@pytest.mark.parametrize("logit", [0.0, -torch.inf])
def test_only_ids_of_the_slice_are_sampled(
    vocab_start: int, logit: float, stages: Stages, device: torch.device
) -> None:
    """Slices begin anywhere, tiles at multiples of 4; memory around a slice is +inf."""
    memory = torch.full((3, 30), torch.inf, device=device)
    logits = memory[:, 8:21].fill_(logit)
    local_candidates, best_candidate = stages
    best = best_candidate(local_candidates(logits, make_batch(3, device, 0.0), vocab_start, 9999))
    assert best[1].tolist() == [vocab_start] * 3
    assert best[0].view(torch.float32).tolist() == [logit] * 3


def test_stop_ids_are_not_sampled_before_the_minimum_position(
    stages: Stages, device: torch.device
) -> None:
    logits = torch.zeros(5, 3000, device=device)
    logits[:, 2999], logits[:, 5], logits[:, 70] = 90.0, 80.0, 60.0
    batch = make_batch(
        5,
        device,
        temperatures=[0.0, 0.0, 1.0, 0.0, 0.0],
        min_positions=[10, 9, 10, 10, 10],
        stop_ids=[[2999, -1], [2999, -1], [2999, -1], [5, 2999], [-1, -1]],
    )
    batch.positions.fill_(9)
    assert sample_through(stages, logits, batch) == [5, 2999, 5, 70, 2999]


def test_stop_ids_of_another_rank_change_nothing(stages: Stages, device: torch.device) -> None:
    local_candidates, best_candidate = stages
    logits = torch.zeros(1, 10, device=device)
    logits[0, 9] = 1.0
    batch = make_batch(1, device, 0.0, 9999, [[9, 30, 19, -1]])
    # This slice holds ids 20 .. 29: id 9 is column -11 here, id 19 column -1, id 30 column 10.
    assert best_candidate(local_candidates(logits, batch, 20, 100))[1].tolist() == [29]


@pytest.mark.parametrize("temperature", [0.0, 1e-10, 1e-38])
def test_no_and_tiny_temperature_sample_the_argmax(
    temperature: float, stages: Stages, device_and_dtype: Where
) -> None:
    logits = random_logits(4, 2500, device_and_dtype)
    logits[:, 1234] = 30.0
    logits[0, 7] = torch.finfo(logits.dtype).max
    logits[1, :1000] = -torch.inf
    batch = make_batch(4, logits.device, temperature)
    best = stages[1](stages[0](logits, batch, 0, 2500))
    assert best[1].tolist() == [7, 1234, 1234, 1234]
    assert not best[0].view(torch.float32).isnan().any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_never_sampled_and_still_give_an_id(
    temperature: float, stages: Stages, device: torch.device
) -> None:
    logits = torch.full((2, 2100), torch.nan, device=device)
    logits[0, 2099] = -5.0
    assert sample_through(stages, logits, make_batch(2, device, temperature)) == [2099, 0]


def test_a_row_s_token_does_not_depend_on_its_batch(stages: Stages, device: torch.device) -> None:
    logits = random_logits(6, 700, (device, torch.float32))
    batch = make_batch(6, device, [1.0, 0.0, 1.0, 1.3, 0.0, 0.9])
    sampled_ids = sample_through(stages, logits, batch)
    for row in range(6):
        alone = batch.at(torch.tensor([row], device=device))
        assert sample_through(stages, logits[row : row + 1], alone) == [sampled_ids[row]]


def test_logits_rows_may_be_strided(stages: Stages, device: torch.device) -> None:
    logits = random_logits(6, 300, (device, torch.float32))[::2, 10:210]
    batch = make_batch(3, device)
    assert sample_through(stages, logits, batch) == sample_through(
        stages, logits.contiguous(), batch
    )


@pytest.mark.parametrize("local_candidates", [local_candidates_triton, local_candidates_reference])
def test_rows_from_two_sources_sample_what_one_source_samples(
    local_candidates: Callable[..., Tensor], device_and_dtype: Where
) -> None:
    """Rows 1, 4 and 2 from float32 logits of their own, the others from the model's."""
    logits = random_logits(6, 2500, device_and_dtype)
    batch = make_batch(6, logits.device, [1.0, 0.0, 1.0, 1.3, 0.0, 0.9])
    changed, others = (torch.tensor(each, device=logits.device) for each in ([1, 4, 2], [0, 3, 5]))
    whole = local_candidates(logits, batch, 0, 2500)
    scores = logits[changed].float()
    logits[changed] = torch.nan  # these are not read
    candidates = local_candidates(logits, batch, 0, 2500, Subset(others))
    both = local_candidates(scores, batch, 0, 2500, Subset(changed, True, candidates))
    assert torch.equal(both, whole)


@pytest.mark.parametrize("vary", ["positions", "seeds"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_the_softmax(vary: str, temperature: float, device: torch.device) -> None:
    """Chi-square over 20 ids, in 20,000 samples of one seed or of 20,000 neighbouring seeds."""
    num_samples, vocab_size = 20_000, 20
    logits = 0.8 * random_logits(1, vocab_size, (device, torch.float32)) / 4
    counter = torch.arange(num_samples, dtype=torch.int32, device=device)
    position, seed = torch.full_like(counter, 3), 12345 * (1 + 2**32)
    if vary == "positions":
        batch = sampled_rows(counter, temperature=temperature, seed=seed)
    else:
        seeds = counter.cpu().numpy().astype(np.uint64) + 12345 * 2**32
        batch = sampled_rows(position, temperature=temperature, seed=seeds)
    ids = sample(
        logits.expand(num_samples, -1).contiguous(), batch, 0, vocab_size, TPGroup.single(device)
    )
    expected = num_samples * (logits[0].cpu().double() / temperature).softmax(-1)
    assert expected.min() > 5  # else the statistic is not chi-square
    counts = ids.cpu().bincount(minlength=vocab_size)
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded by chance once in 1000 times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_sample_follows_its_inputs() -> None:
    device = torch.device("cuda")
    tp = TPGroup.single(device)
    logits = random_logits(4, 9000, (device, torch.bfloat16))
    batch = make_batch(4, device, [0.0, 1.0, 0.5, 0.0])
    sample(logits, batch, 0, 9000, tp)  # compile outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, batch, 0, 9000, tp)
    logits.copy_(logits.roll(17, dims=1))
    batch.positions += 1
    temperatures = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    batch.table[:, column("temperature")] = temperatures.view(torch.int32)
    graph.replay()
    assert captured.tolist() == sample(logits, batch, 0, 9000, tp).tolist()
