"""The records of a step: they are read as they were written, and none exceeds its stated size."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.channel.logprob_records import LogprobBlock, position_words
from tpllm.channel.ring import RingReader, RingWriter, create_ring
from tpllm.channel.row_record import ROW, row_words
from tpllm.channel.step_plan import (
    STEP,
    VERSION,
    PlanLimits,
    StepMasks,
    StepPlan,
    StepResult,
)
from tpllm.sampling_params import MAX_LOGPROBS

FIELDS = (
    "rows",
    "starts",
    "num_tokens",
    "samples",
    "entering",
    "block_updates",
    "token_ids",
    "row_lists",
)


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return any int32 words, also negative ones, as seeds and float bits are."""
    return rng.integers(-(2**31), 2**31, size=shape, dtype=np.int32)


def random_plan(
    rng: np.random.Generator,
    S: int,
    num_decode: int,
    entering: int,
    updates: int,
    tokens: int,
    lists: int = 0,
) -> StepPlan:
    return StepPlan(
        step=int(rng.integers(0, 2**62)),
        num_decode=num_decode,
        rows=words(rng, S),
        starts=words(rng, S),
        num_tokens=words(rng, S),
        samples=words(rng, S),
        entering=words(rng, entering * row_words()).view(ROW),
        block_updates=words(rng, updates, 2),
        token_ids=words(rng, tokens),
        row_lists=words(rng, lists),
    )


def payload_of(record: StepPlan | StepMasks | StepResult) -> np.ndarray:
    return np.frombuffer(b"".join(each.tobytes() for each in record.buffers()), np.uint8)


def check_equal(received: StepPlan, sent: StepPlan) -> None:
    assert (received.step, received.num_decode) == (sent.step, sent.num_decode)
    for name in FIELDS:
        array: np.ndarray = getattr(received, name)
        assert array.dtype == (ROW if name == "entering" else np.int32)
        assert array.shape == getattr(sent, name).shape
        assert array.tobytes() == getattr(sent, name).tobytes()


sizes = st.integers(0, 5)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    S=sizes,
    num_decode=sizes,
    entering=sizes,
    updates=sizes,
    tokens=st.integers(0, 40),
    lists=st.integers(0, 40),
)
def test_a_plan_is_read_as_it_was_written(seed: int, **counts: Any):
    sent = random_plan(np.random.default_rng(seed), **counts)
    payload = payload_of(sent)
    received = StepPlan.decode(payload)
    check_equal(received, sent)
    assert all(
        np.shares_memory(getattr(received, name), payload)
        for name in FIELDS
        if getattr(sent, name).size
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), num_yielded=st.lists(st.integers(0, 3), max_size=20))
def test_a_result_is_read_as_it_was_written(seed: int, num_yielded: list[int]):
    rng = np.random.default_rng(seed)
    sent = StepResult(
        step=int(rng.integers(0, 2**62)),
        num_yielded=np.array(num_yielded, dtype=np.int32),
        token_ids=words(rng, sum(num_yielded)),
        logprobs=words(rng, 2 * sum(num_yielded)),
    )
    received = StepResult.decode(payload_of(sent))
    assert received.step == sent.step
    np.testing.assert_array_equal(received.num_yielded, sent.num_yielded, strict=True)
    np.testing.assert_array_equal(received.token_ids, sent.token_ids, strict=True)
    np.testing.assert_array_equal(received.logprobs, sent.logprobs, strict=True)


def test_slices_of_a_larger_array_are_written_in_order():
    rng = np.random.default_rng(0)
    sent = random_plan(rng, S=3, num_decode=1, entering=2, updates=4, tokens=6)
    sent.rows = words(rng, 6)[::2]
    sent.block_updates = words(rng, 2, 4).T
    fds = create_ring(num_readers=1, num_slots=1, slot_bytes=4096)
    try:
        assert RingWriter(fds).try_send(STEP, sent.buffers())
        record = RingReader(fds, 0).try_receive()
        assert record is not None and record.kind == STEP
        check_equal(StepPlan.decode(record.payload), sent)
    finally:
        fds.close()


LIMITS = [
    PlanLimits(1, 1, max_blocks_per_seq=1, block_size=1, vocab_size=5, max_logprobs=20),
    PlanLimits(7, 100, max_blocks_per_seq=13, block_size=16, vocab_size=4099, max_logprobs=20),
    PlanLimits(
        256, 16384, max_blocks_per_seq=160, block_size=256, vocab_size=151936, max_logprobs=20
    ),
]


@pytest.mark.parametrize("limits", LIMITS)
def test_the_largest_plan_has_the_bytes_that_its_limits_announce(limits: PlanLimits):
    S = limits.max_num_seqs
    rng = np.random.default_rng(0)
    tokens, lists = limits.max_num_batched_tokens, limits.max_row_list_words
    plan = random_plan(rng, S, 0, S, limits.max_block_updates, tokens, lists)
    assert payload_of(plan).size == limits.plan_bytes
    fds = create_ring(num_readers=1, num_slots=2, slot_bytes=limits.plan_bytes)
    try:
        writer, reader = RingWriter(fds), RingReader(fds, 0)
        assert writer.try_send(STEP, plan.buffers())
        record = reader.try_receive()
        assert record is not None
        check_equal(StepPlan.decode(record.payload), plan)
        plan.token_ids = words(rng, limits.max_num_batched_tokens + 1)
        with pytest.raises(ValueError, match=f"a record of {limits.plan_bytes + 4} bytes"):
            writer.try_send(STEP, plan.buffers())
    finally:
        fds.close()


@pytest.mark.parametrize("limits", LIMITS)
def test_the_largest_result_has_the_bytes_that_its_limits_announce(limits: PlanLimits):
    S, N = limits.max_num_seqs, limits.max_num_batched_tokens
    ones = np.ones(S, dtype=np.int32)
    widest = position_words(MAX_LOGPROBS)

    def block(index: int, n: int) -> np.ndarray:
        return LogprobBlock.from_words(
            index, 0, np.ones((n, widest), np.int32), MAX_LOGPROBS
        ).record()

    # every row reports log-probabilities of its new token and of a prompt chunk
    of_prompts = [block(i, len(part)) for i, part in enumerate(np.array_split(np.arange(N), S))]
    logprobs = np.concatenate([*of_prompts, *(block(i, 1) for i in range(S))])
    assert payload_of(StepResult(0, ones, ones, logprobs)).size == limits.result_bytes


@pytest.mark.parametrize("num_rows", [0, 3])
def test_masks_are_read_as_they_were_written(num_rows: int):
    rng = np.random.default_rng(0)
    sent = StepMasks(7, words(rng, num_rows), words(rng, num_rows, 5))
    received = StepMasks.decode(payload_of(sent))
    assert received.step == 7
    np.testing.assert_array_equal(received.indices, sent.indices, strict=True)
    np.testing.assert_array_equal(received.words, sent.words, strict=True)


@pytest.mark.parametrize("limits", LIMITS)
def test_the_most_masks_have_the_bytes_that_the_limits_announce(limits: PlanLimits):
    rng, S = np.random.default_rng(0), limits.max_num_seqs
    masks = StepMasks(0, words(rng, S), words(rng, S, limits.mask_words))
    assert payload_of(masks).size == limits.masks_bytes
    assert 0 <= 32 * limits.mask_words - limits.vocab_size < 32


def test_block_updates_leave_room_for_the_longest_sequence_and_for_a_full_step():
    limits = LIMITS[1]
    decodes = limits.max_num_seqs  # each row may need a block for its new token
    assert limits.max_block_updates >= limits.max_blocks_per_seq + decodes
    # a budget of 100 tokens in prompts of 1, 1, 1, 1, 1, 1 and 94 tokens
    assert limits.max_block_updates >= 6 + -(-94 // limits.block_size)


def test_a_decode_step_of_256_sequences_costs_a_few_kilobytes():
    plan = random_plan(
        np.random.default_rng(0), S=256, num_decode=256, entering=0, updates=1, tokens=0
    )
    assert payload_of(plan).size < 5000


@pytest.mark.parametrize("record", [StepPlan, StepMasks, StepResult])
def test_a_record_of_another_version_is_refused(record: type[StepPlan | StepMasks | StepResult]):
    one = np.ones(1, np.int32)
    payload = payload_of(StepResult(0, one, one, one[:0])).copy()
    payload[:8].view("<i8")[0] = 1
    with pytest.raises(ValueError, match=f"version 1 and this process reads version {VERSION}; "):
        record.decode(payload)
