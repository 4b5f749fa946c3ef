"""How the tokens of a step are divided into two micro-batches."""

from dataclasses import replace

import numpy as np

from tests.worker.test_step_inputs import PLAN, SPLIT, chunks_of, int32
from tpllm.worker.micro_batches import split_plan
from tpllm.worker.step_inputs import LAST_TOKEN, StepInputs, mixed_inputs


def micro_batches_of(
    num_tokens: np.ndarray,
) -> tuple[StepInputs[np.ndarray], StepInputs[np.ndarray]]:
    plan = replace(PLAN, num_tokens=num_tokens, token_ids=np.arange(int(num_tokens[2:].sum())))
    first, second = split_plan(plan)
    return mixed_inputs(first, SPLIT), mixed_inputs(second, SPLIT)


def test_a_chunk_in_the_middle_is_split() -> None:
    first, second = micro_batches_of(int32(1, 1, 2, 7))
    assert first.token_rows.tolist() == [4, 0, 1, 1, 2]
    assert first.positions.tolist() == [9, 5, 0, 1, 8]
    assert chunks_of(first).token_ids.tolist() == [LAST_TOKEN, LAST_TOKEN, 0, 1, 2]
    assert (chunks_of(first).context_lens.tolist(), chunks_of(first).rows.tolist()) == (
        [10, 6],
        [1, 2],
    )
    assert (chunks_of(first).cu_seqlens_q.tolist(), chunks_of(first).cu_seqlens_k.tolist()) == (
        [2, 4, 5],
        [0, 2, 11],
    )
    assert second.token_rows.tolist() == [2] * 6
    assert second.positions.tolist() == [9, 10, 11, 12, 13, 14]
    assert chunks_of(second).token_ids.tolist() == [3, 4, 5, 6, 7, 8]
    assert (chunks_of(second).context_lens.tolist(), chunks_of(second).rows.tolist()) == ([], [2])
    assert (chunks_of(second).cu_seqlens_q.tolist(), chunks_of(second).cu_seqlens_k.tolist()) == (
        [0, 6],
        [0, 15],
    )


def test_micro_batches_that_end_between_chunks_split_none() -> None:
    first, second = micro_batches_of(int32(1, 1, 2, 4))
    assert (first.token_rows.tolist(), second.token_rows.tolist()) == ([4, 0, 1, 1], [2] * 4)
    assert chunks_of(first).cu_seqlens_q.tolist() == [2, 4]
    assert second.positions.tolist() == [8, 9, 10, 11]
    first, second = micro_batches_of(int32(1, 1, 1, 1))
    assert (first.token_rows.tolist(), second.token_rows.tolist()) == ([4, 0], [1, 2])
    assert chunks_of(first).rows.tolist() == []


def test_decode_rows_may_be_in_both_micro_batches() -> None:
    plan = replace(PLAN, num_decode=3, num_tokens=int32(1, 1, 1, 1), token_ids=int32(40))
    first, second = (mixed_inputs(each, SPLIT) for each in split_plan(plan))
    assert (chunks_of(first).context_lens.tolist(), chunks_of(second).context_lens.tolist()) == (
        [10, 6],
        [1],
    )
    assert (chunks_of(first).rows.tolist(), chunks_of(second).rows.tolist()) == ([], [2])
    assert chunks_of(second).token_ids.tolist() == [LAST_TOKEN, 40]
    assert chunks_of(second).cu_seqlens_q.tolist() == [1, 2]
