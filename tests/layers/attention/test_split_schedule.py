"""KV splits: they cover all contexts, fit the schedule, and none is much longer than others."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.layers.attention.split_schedules import assert_every_token_is_in_one_split
from tpllm.layers.attention.split_schedule import (
    BEGIN,
    COUNT,
    END,
    INDEX,
    NUM_SCRATCH_ENTRIES,
    SCRATCH,
    SPLIT_GRANULARITY,
    SPLIT_WORDS,
    ContextSplit,
    SplitSchedules,
)

CONTEXTS = st.lists(st.integers(0, 200) | st.integers(0, 40_000), max_size=300)
KV_HEADS = st.sampled_from([1, 2, 3, 4, 8, 16, 64, 300])


def used_splits(context_lens: list[int], num_kv_heads: int) -> np.ndarray:
    """Return the used rows of a schedule; all rows after them are 0."""
    split = ContextSplit(num_kv_heads)
    return used_of(split, split.schedule(np.array(context_lens, dtype=np.int32)), len(context_lens))


def used_of(split: ContextSplit, schedule: np.ndarray, num_seqs: int) -> np.ndarray:
    assert schedule.shape == (split.num_splits(num_seqs), SPLIT_WORDS)
    assert schedule.dtype == np.int32
    used = schedule[:, END] > schedule[:, BEGIN]
    num_used = int(used.sum())
    assert used[:num_used].all()
    assert not schedule[num_used:].any()
    return schedule[:num_used]


@given(CONTEXTS, KV_HEADS)
def test_every_token_is_in_one_split(context_lens: list[int], num_kv_heads: int) -> None:
    splits = used_splits(context_lens, num_kv_heads)
    lengths = splits[:, END] - splits[:, BEGIN]
    assert (np.diff(lengths) <= 0).all()  # the longest begins first
    assert_every_token_is_in_one_split(splits, context_lens)


@given(CONTEXTS, KV_HEADS)
@example([40_000], 36)  # uses all entries
def test_splits_of_one_context_have_their_own_scratch_entries(
    context_lens: list[int], num_kv_heads: int
) -> None:
    splits = used_splits(context_lens, num_kv_heads)
    combined = splits[splits[:, COUNT] > 1]
    entries = combined[:, SCRATCH] + combined[:, INDEX]
    assert sorted(entries.tolist()) == list(range(len(combined)))
    assert len(combined) * num_kv_heads <= NUM_SCRATCH_ENTRIES


@given(st.integers(1, 2000), KV_HEADS)
def test_a_schedule_of_more_sequences_is_no_smaller(num_seqs: int, num_kv_heads: int) -> None:
    split = ContextSplit(num_kv_heads)
    assert split.num_splits(0) == 0
    assert split.num_splits(num_seqs - 1) <= split.num_splits(num_seqs)


@pytest.mark.parametrize(
    "context_lens, num_kv_heads, lengths",
    [
        ([300], 8, [128, 128, 44]),  # no split is shorter, since combining costs time
        ([2048], 8, [128] * 16),
        ([32_768], 8, [1024] * 32),
        # as many splits as concurrent programs, and whole contexts if there are enough of them
        ([1000] * 16, 8, [384, 384, 232] * 16),
        ([1000] * 40, 8, [1000] * 40),
    ],
)
def test_few_contexts_fill_the_gpu(
    context_lens: list[int], num_kv_heads: int, lengths: list[int]
) -> None:
    splits = used_splits(context_lens, num_kv_heads)
    assert sorted((splits[:, END] - splits[:, BEGIN]).tolist()) == sorted(lengths)


def test_a_long_context_does_not_delay_the_others() -> None:
    """No split is longer than all tokens divided by the concurrent programs."""
    context_lens = [32_768] + [860] * 184
    splits = used_splits(context_lens, 8)
    longest = int((splits[:, END] - splits[:, BEGIN]).max())
    assert longest < sum(context_lens) * 8 / 660


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    st.lists(st.integers(0, 2**40), max_size=20),
    KV_HEADS,
)
def test_schedules_are_extended_from_step_to_step(
    context_lens: list[int], steps: list[int], num_kv_heads: int
) -> None:
    """Each sequence grows by one token, or by none, as padding does; sequences may end."""
    split = ContextSplit(num_kv_heads)
    schedules = SplitSchedules(split)
    lens = np.array(context_lens, dtype=np.int32)
    for step in steps:
        splits = used_of(split, schedules.next(lens), lens.size)
        assert_every_token_is_in_one_split(splits, lens.tolist())
        combined = splits[splits[:, COUNT] > 1]
        assert len(combined) * num_kv_heads <= NUM_SCRATCH_ENTRIES
        lens = lens + (step >> np.arange(lens.size) & 1).astype(np.int32)
        if step % 7 == 0 and lens.size > 1:
            lens = lens[:-1]


def test_contexts_are_divided_again_after_a_while() -> None:
    schedules = SplitSchedules(ContextSplit(8))
    longest = []
    for length in range(128, 128 + 3 * SPLIT_GRANULARITY):
        schedule = schedules.next(np.array([length], dtype=np.int32))
        longest.append(int((schedule[:, END] - schedule[:, BEGIN]).max()))
    assert max(longest) == 128 + SPLIT_GRANULARITY  # one split, as at the start
    assert longest[SPLIT_GRANULARITY : SPLIT_GRANULARITY + 2] == [128 + SPLIT_GRANULARITY, 128]


def test_other_sequences_are_divided_again() -> None:
    split = ContextSplit(8)
    schedules = SplitSchedules(split)
    for lens in ([500, 700], [501, 702], [500, 702], [501, 703, 4]):
        context_lens = np.array(lens, dtype=np.int32)
        assert np.array_equal(schedules.next(context_lens), split.schedule(context_lens))
