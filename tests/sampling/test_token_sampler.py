"""Sampling with options against transformers' processors with the same noise, on random logits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tpllm.channel.row_record import (
    LISTS,
    PENALTIES,
    TRUNCATIONS,
    differ,
    new_records,
    read_tokens,
    split_lists,
    words_of,
)
from tpllm.channel.step_plan import PlanLimits, StepMasks
from tpllm.parallel.group import TPGroup
from tpllm.sampling import processors, sampler, token_sampler
from tpllm.sampling.gumbel import gumbel_reference, noise_bits_reference
from tpllm.sampling.row_table import RowTable, SampledRows, upload
from tpllm.sampling.token_sampler import RowsToSample, StepOutput, TokenSampler

V = 997
LIMITS = PlanLimits(12, 100, 4, 16, V, max_logprobs=20)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


class Asked:
    """What a row asks for: fields of its record, and lists; both are attributes."""

    def __init__(self, **given: Any) -> None:
        self.lists = {name: np.array(given.pop(name, []), type_) for name, type_ in LISTS.items()}
        self.record = new_records(1)
        for name, value in given.items():
            self.record[name] = value
        if read_tokens(self.record)[0] or self.lists["bad_word_ids"].size:
            self.lists["tokens"] = ids(*HISTORY)
        self.record["list_sizes"] = [each.size for each in self.lists.values()]

    def __getattr__(self, name: str) -> Any:
        return self.lists[name] if name in self.lists else self.record[name][0].item()

    def differs(self, *names: str) -> bool:
        return bool(differ(self.record, names)[0])


def enter(table: RowTable, asked: dict[int, Asked], temperature: float = 0.8) -> None:
    """Let these rows enter."""
    records = np.concatenate([each.record for each in asked.values()])
    records["row"] = list(asked)
    records["seed"] = [row + 1 + (row + 2 << 32) for row in asked]
    records["temperature"], records["min_position"] = temperature, 99
    lists = [each.view(np.int32) for row in asked.values() for each in row.lists.values()]
    table.enter(records, np.concatenate(lists))
    table.store(upload(words_of(records), table.words.device))


HISTORY = [5, 9, 5, 300, 41, 7, 5, 41]  # of every row; the first five are its prompt
# A bias that makes these ids likely.
BIAS: dict[str, Any] = {
    "bias_ids": ids(7, 5, 41, 300),
    "bias_values": np.array([9, 9, 9, 9], np.float32),
}
OPTIONS: dict[str, Asked] = {
    "none": Asked(),
    "logprobs": Asked(num_logprobs=3),
    "top_k": Asked(top_k=7),
    "top_p": Asked(top_p=0.4),
    "min_p": Asked(min_p=0.3),
    "penalties": Asked(
        num_prompt_tokens=5,
        repetition_penalty=8.0,
        frequency_penalty=0.7,
        presence_penalty=0.4,
        **BIAS,
    ),
    "allowed": Asked(allowed_ids=ids(3, 4, 5, 600, 601)),
    "bad words": Asked(
        num_prompt_tokens=5,
        bad_word_ids=ids(7, 5, 41, 300, 5, 41, 5, 9, 5),
        bad_word_ends=ids(1, 4, 7, 9),
        **BIAS,
    ),
    "banned": Asked(banned_ids=ids(7, 5), **BIAS),
    "everything": Asked(
        num_prompt_tokens=5,
        top_k=50,
        top_p=0.9,
        min_p=0.001,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.3,
        num_logprobs=20,
        allowed_ids=np.arange(0, V, 2, dtype=np.int32),
        bad_word_ids=ids(4, 41, 8),
        bad_word_ends=ids(1, 3),
        banned_ids=ids(12),
        is_masked=True,
        **BIAS,
    ),
    "another top_k": Asked(top_k=1),
    "masked": Asked(is_masked=True),
}
MASK = np.arange(V) % 7 > 4  # of rows that are masked
MASK_WORDS = np.packbits(np.pad(MASK, (0, -V % 32)), bitorder="little").view(np.int32)


def expected_token(logits: Tensor, chosen: Asked, noise: Tensor, heat: float) -> int:
    """Apply transformers' processors in vLLM's order; return the id of the largest noisy score."""
    from transformers.generation import logits_process as theirs

    scores: Any = logits.float().clone().unsqueeze(0)
    tokens: Any = torch.tensor([HISTORY])
    if chosen.is_masked:
        scores[0, ~torch.from_numpy(MASK)] = -torch.inf
    if chosen.allowed_ids.size:
        kept = scores[0, chosen.allowed_ids].clone()
        scores.fill_(-torch.inf)[0, chosen.allowed_ids] = kept
    words = [each.tolist() for each in np.split(chosen.bad_word_ids, chosen.bad_word_ends)[:-1]]
    if words:
        output: Any = torch.tensor([HISTORY[chosen.num_prompt_tokens :]])
        eos: Any = V
        scores = theirs.NoBadWordsLogitsProcessor(words, eos)(output, scores)
    scores[0, chosen.banned_ids] = -torch.inf
    scores[0, chosen.bias_ids] += torch.from_numpy(chosen.bias_values)
    if chosen.differs(*PENALTIES):
        penalty = chosen.repetition_penalty
        scores = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores)
        for token in set(output_ids := HISTORY[chosen.num_prompt_tokens :]):
            scores[0, token] -= chosen.frequency_penalty * output_ids.count(token)
            scores[0, token] -= chosen.presence_penalty
    scores /= heat
    if chosen.min_p:
        scores = theirs.MinPLogitsWarper(chosen.min_p)(tokens, scores)
    if chosen.top_k:
        scores = theirs.TopKLogitsWarper(chosen.top_k)(tokens, scores)
    if chosen.top_p < 1:
        scores = theirs.TopPLogitsWarper(chosen.top_p)(tokens, scores)
    return int((scores[0] + noise).argmax())


class Rig:
    """Rows in the order of `names`, each with its options; the ninth token is sampled next."""

    def __init__(self, names: list[str], device: str, greedy: bool = False) -> None:
        tp = TPGroup.single(torch.device(device))
        self.names, self.greedy = names, greedy
        self.table = RowTable(LIMITS, 0, V, tp.device)
        self.sampler = TokenSampler(self.table, 0, V, tp, self.masks)
        self.without_mask: set[str] = set()
        self.rows = np.array([list(OPTIONS).index(name) for name in names], dtype=np.int32)
        asked = {row: OPTIONS[name] for row, name in zip(self.rows.tolist(), names, strict=True)}
        enter(self.table, asked, 0 if greedy else 0.8)
        rng = torch.Generator().manual_seed(0)
        self.logits = (2 * torch.randn(len(OPTIONS), V, generator=rng))[self.rows].to(tp.device)
        positions = torch.full((len(names),), len(HISTORY), dtype=torch.int32, device=tp.device)
        rows = upload(self.rows, tp.device)
        self.batch = SampledRows(self.table.words, rows, positions)

    def masks(self, step: int) -> StepMasks:
        """Return masks of all rows that wait for one, in another order than the rows."""
        waiting = [i for i, name in enumerate(self.names) if OPTIONS[name].is_masked]
        kept = [i for i in waiting[::-1] if self.names[i] not in self.without_mask]
        return StepMasks(step, ids(*kept), np.stack([MASK_WORDS] * len(kept)))

    def sample(self) -> StepOutput:
        positions = np.full(len(self.names), len(HISTORY))
        to_sample = RowsToSample(3, np.arange(len(self.names)), self.rows, positions, self.batch)
        tokens = self.sampler.sample_changed(self.logits, to_sample)
        if tokens is None:
            tokens = self.plain()
        return self.sampler.finish(self.logits, tokens, to_sample)

    def plain(self) -> Tensor:
        """Sample by temperature alone."""
        return self.sampler.sample(self.logits, self.batch)

    def expected(self) -> list[int]:
        batch = self.batch
        noise = gumbel_reference(
            noise_bits_reference(batch.column("seed"), batch.positions, 0, V)
        ).cpu()
        if self.greedy:
            noise = torch.zeros_like(noise)
        return [
            expected_token(self.logits[i].cpu(), OPTIONS[name], noise[i], 1 if self.greedy else 0.8)
            for i, name in enumerate(self.names)
        ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("greedy", [False, True])
def test_every_option_samples_what_transformers_processors_keep(device: str, greedy: bool) -> None:
    names = [
        name for name, options in OPTIONS.items() if not greedy or not options.differs(*TRUNCATIONS)
    ]
    rig = Rig(names, device, greedy)
    assert rig.sample().tokens.tolist() == rig.expected()


def test_options_change_the_sampled_tokens() -> None:
    """Without this the test above would prove nothing."""
    rig = Rig(list(OPTIONS), "cpu")
    sampled_ids = rig.sample().tokens.tolist()
    without = rig.plain().tolist()
    noise = gumbel_reference(
        noise_bits_reference(rig.batch.column("seed"), rig.batch.positions, 0, V)
    )
    for i, options in enumerate(OPTIONS.values()):
        if options.bias_ids.size:  # what the bias alone gives
            without[i] = expected_token(rig.logits[i], Asked(**BIAS), noise[i], 0.8)
    same = [name for i, name in enumerate(OPTIONS) if sampled_ids[i] == without[i]]
    assert same == ["none", "logprobs"]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_alone_in_any_order_and_in_pieces_sample_the_same(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Rig(list(OPTIONS), device).sample()
    expected = dict(zip(OPTIONS, together.tokens.tolist(), strict=True))
    for name in OPTIONS:
        assert Rig([name], device).sample().tokens.tolist() == [expected[name]]
    backwards = list(OPTIONS)[::-1]
    monkeypatch.setattr(token_sampler, "MAX_ELEMENTS", 2 * V)
    monkeypatch.setattr(processors, "MAX_TOKENS", 1)
    pieces = Rig(backwards, device).sample()
    assert pieces.tokens.tolist() == [expected[name] for name in backwards]
    words = [output.logprobs[0].words[:, :4].tolist() for output in (together, pieces)]
    assert words[0] == words[1][::-1]


def test_logprobs_are_those_of_the_model_in_the_number_each_row_requests() -> None:
    rig = Rig(list(OPTIONS), "cpu")
    output = rig.sample()
    (reported,) = output.logprobs
    assert reported.blocks == [(1, 8, 1, 3), (9, 8, 1, 20)]
    exact = torch.log_softmax(rig.logits.double(), dim=1)
    for (index, _, _, k), block in zip(
        reported.blocks, reported.to_records(reported.words.numpy()), strict=True
    ):
        token = int(output.tokens[index])
        likeliest = exact[index].topk(k)
        rank = int((exact[index] > exact[index, token]).sum()) + 1
        assert block[:5].tolist() == [index, 8, 1, 1 + k, rank]
        assert block[5 : 6 + k].tolist() == [token, *likeliest.indices.tolist()]
        logprobs = torch.from_numpy(block[6 + k :].view(np.float32).copy()).double()
        values = torch.cat([exact[index, token].unsqueeze(0), likeliest.values])
        torch.testing.assert_close(logprobs, values, rtol=0, atol=2e-6)


def test_sampled_tokens_are_stored_for_the_rows_that_read_them() -> None:
    rig = Rig(list(OPTIONS), "cpu")
    output = rig.sample()
    for row, (name, options) in enumerate(OPTIONS.items()):
        noted = rig.table.tokens[row, : len(HISTORY) + 1].tolist()
        reads = options.lists["tokens"].size
        assert noted == ([*HISTORY, int(output.tokens[row])] if reads else [0] * 9), name


def test_a_row_that_waits_and_gets_no_mask_samples_from_all_tokens() -> None:
    rig = Rig(list(OPTIONS), "cpu")
    expected = rig.expected()
    expected[-1] = int(rig.plain()[-1])
    rig.without_mask = {"masked"}
    assert rig.sample().tokens.tolist() == expected


def test_a_row_keeps_nothing_of_its_last_sequence() -> None:
    rig = Rig(list(OPTIONS), "cpu")
    enter(rig.table, dict.fromkeys(rig.rows.tolist(), Asked()))
    assert not rig.table.has_options and not rig.table.lists.bias_values.numel()
    plain = rig.plain().tolist()
    assert rig.sample().tokens.tolist() == plain
    row = 3
    enter(rig.table, {row: Asked(banned_ids=[plain[row]])})
    sampled_ids = rig.sample().tokens.tolist()
    assert sampled_ids[row] != plain[row]
    assert sampled_ids[:row] + sampled_ids[row + 1 :] == plain[:row] + plain[row + 1 :]


def test_no_row_is_sampled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []

    def count(*args: Any, **options: Any) -> Tensor:
        where = args[4].where if len(args) > 4 else torch.arange(len(args[0]))
        sampled.extend(where.tolist())
        return local_candidates(*args, **options)

    local_candidates = sampler.local_candidates
    monkeypatch.setattr(token_sampler, "local_candidates", count)
    monkeypatch.setattr(sampler, "local_candidates", count)
    monkeypatch.setattr(token_sampler, "MAX_ELEMENTS", 2 * V)
    Rig(list(OPTIONS), "cpu").sample()
    assert sorted(sampled) == list(range(len(OPTIONS)))
    sampled.clear()
    Rig(["none", "logprobs"], "cpu").sample()
    assert sampled == [0, 1]


def test_lists_are_split_as_they_were_joined() -> None:
    records = np.concatenate([each.record for each in OPTIONS.values()])
    lists = [each.view(np.int32) for row in OPTIONS.values() for each in row.lists.values()]
    received = split_lists(records, np.concatenate(lists))
    for sent, each in zip(OPTIONS.values(), received, strict=True):
        assert list(each) == list(sent.lists)
        for name, values in each.items():
            np.testing.assert_array_equal(values, sent.lists[name], strict=True)
