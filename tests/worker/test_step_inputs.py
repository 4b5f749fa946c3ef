"""A step's integers, with their true sizes and padded to a graph's size."""

from dataclasses import replace

import numpy as np

from tpllm.channel.row_record import new_records
from tpllm.channel.step_plan import StepPlan
from tpllm.layers.attention.split_schedule import SPLIT_WORDS, ContextSplit
from tpllm.worker.cuda_graphs import MAX_CHUNKS, StepSize
from tpllm.worker.step_inputs import (
    LAST_TOKEN,
    ChunkInputs,
    ChunkLengths,
    StepInputs,
    chunk_lengths,
    decode_inputs,
    flatten_chunks,
    mixed_inputs,
    padded,
    upload_sizes,
)


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


SPLIT = ContextSplit(num_kv_heads=8)
# rows 4 and 0 decode; rows 1 and 2 compute two tokens each, row 2 after eight cached ones
PLAN = StepPlan(
    step=0,
    num_decode=2,
    rows=int32(4, 0, 1, 2),
    starts=int32(9, 5, 0, 8),
    num_tokens=int32(1, 1, 2, 2),
    samples=int32(1, 1, 1, 0),
    entering=new_records(0),
    block_updates=np.empty((0, 2), dtype=np.int32),
    token_ids=int32(30, 31, 40, 41),
    row_lists=int32(),
)


def test_chunks_are_flattened_to_tokens() -> None:
    rows, starts, lengths = (np.array(x, dtype=np.int32) for x in ([4, 1, 2], [9, 0, 3], [1, 3, 2]))
    token_rows, positions, cu_seqlens = flatten_chunks(rows, starts, lengths)
    assert token_rows.tolist() == [4, 1, 1, 1, 2, 2]
    assert positions.tolist() == [9, 0, 1, 2, 3, 4]
    assert cu_seqlens.tolist() == [0, 1, 4, 6]
    assert {token_rows.dtype, positions.dtype, cu_seqlens.dtype} == {np.dtype(np.int32)}


def chunks_of(inputs: StepInputs[np.ndarray]) -> ChunkInputs[np.ndarray]:
    assert inputs.chunks is not None
    return inputs.chunks


def test_inputs_are_those_of_the_plan() -> None:
    inputs = mixed_inputs(PLAN, SPLIT)
    assert inputs.token_rows.tolist() == [4, 0, 1, 1, 2, 2]
    assert inputs.positions.tolist() == [9, 5, 0, 1, 8, 9]
    assert chunks_of(inputs).token_ids.tolist() == [LAST_TOKEN, LAST_TOKEN, 30, 31, 40, 41]
    assert chunks_of(inputs).context_lens.tolist() == [10, 6]
    assert inputs.split_schedule.tolist() == SPLIT.schedule(int32(10, 6)).reshape(-1).tolist()
    assert chunks_of(inputs).rows.tolist() == [1, 2]
    assert chunks_of(inputs).cu_seqlens_q.tolist() == [2, 4, 6]
    assert chunks_of(inputs).cu_seqlens_k.tolist() == [0, 2, 12]
    assert {array.dtype for array in inputs.arrays()} == {np.dtype(np.int32)}


def test_padding_has_no_context_and_uses_the_padding_row() -> None:
    size = StepSize(8, 3, MAX_CHUNKS)
    inputs = padded(mixed_inputs(PLAN, SPLIT), size, 7, SPLIT)
    assert [array.size for array in inputs.arrays()] == upload_sizes(size, SPLIT)
    assert inputs.token_rows.tolist() == [4, 0, 1, 1, 2, 2, 7, 7]
    assert inputs.positions.tolist() == [9, 5, 0, 1, 8, 9, 0, 0]
    assert chunks_of(inputs).token_ids.tolist() == [LAST_TOKEN, LAST_TOKEN, 30, 31, 40, 41, 0, 0]
    assert chunks_of(inputs).context_lens.tolist() == [10, 6, 0]
    splits = inputs.split_schedule.reshape(-1, SPLIT_WORDS)
    assert np.array_equal(splits, SPLIT.schedule(int32(10, 6, 0)))
    assert chunks_of(inputs).rows.tolist() == [1, 2] + [7] * (MAX_CHUNKS - 2)
    assert chunks_of(inputs).cu_seqlens_q.tolist() == [2, 4, 6] + [6] * (MAX_CHUNKS - 2)
    assert chunks_of(inputs).cu_seqlens_k.tolist() == [0, 2, 12] + [12] * (MAX_CHUNKS - 2)
    assert {array.dtype for array in inputs.arrays()} == {np.dtype(np.int32)}


def test_a_decode_step_is_rows_and_positions() -> None:
    plan = replace(PLAN, rows=int32(4, 0), starts=int32(9, 5))
    inputs = decode_inputs(plan, 4, 7, SPLIT.schedule)
    assert inputs.chunks is None
    sizes = upload_sizes(StepSize(4, 4, 0), SPLIT)
    assert [array.size for array in inputs.arrays()] == sizes
    assert inputs.token_rows.tolist() == [4, 0, 7, 7]
    assert inputs.positions.tolist() == [9, 5, 0, 0]
    assert np.array_equal(inputs.split_schedule, SPLIT.schedule(int32(10, 6, 1, 1)))
    assert {array.dtype for array in inputs.arrays()} == {np.dtype(np.int32)}


def test_lengths_are_those_of_the_chunks() -> None:
    assert chunk_lengths(PLAN) == ChunkLengths(2, 10, has_context=True)
    decode = replace(PLAN, rows=PLAN.rows[:2], starts=PLAN.starts[:2], num_tokens=int32(1, 1))
    assert chunk_lengths(decode) == ChunkLengths(0, 0, has_context=False)
