"""Inputs of a mixed step's forward, laid out on the host with their true sizes or padded.

N tokens: the first D are decode rows of one token each, the others belong to P prefill chunks.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from tpllm.channel.step_plan import StepPlan
from tpllm.layers.attention.split_schedule import SPLIT_WORDS, ContextSplit
from tpllm.worker.cuda_graphs import MAX_CHUNKS, MixedSize

Array = TypeVar("Array", np.ndarray, Tensor, int)

LAST_TOKEN = -1


@dataclass
class MixedInputs(Generic[Array]):
    """A step's integers, all int32, on the host or on the device.

    Attributes:
        token_rows: [N] row of each token
        positions: [N] its index in its sequence
        token_ids: [N] of prompts; LAST_TOKEN for decode rows, whose token is only on the device
        context_lens: [D] tokens that each decode row attends to, itself included; 0 for padding
        split_schedule: KV splits of the decode rows, SPLIT_WORDS each: see `ContextSplit`
        chunk_rows: [P] row of each chunk
        cu_seqlens_q: [P + 1] index of each chunk's first token in the step, and the last one's end
        cu_seqlens_k: [P + 1] running sum of the chunks' context lengths
    """

    token_rows: Array
    positions: Array
    token_ids: Array
    context_lens: Array
    split_schedule: Array
    chunk_rows: Array
    cu_seqlens_q: Array
    cu_seqlens_k: Array

    def arrays(self) -> list[Array]:
        """Return the arrays in the order of the attributes."""
        return [getattr(self, name) for name in self.__dataclass_fields__]


def upload_sizes(size: MixedSize, split: ContextSplit) -> list[int]:
    """Return the number of words of each array of inputs that are padded to `size`."""
    N, D, P = size.num_tokens, size.num_decode, MAX_CHUNKS
    return [N, N, N, D, split.num_splits(D) * SPLIT_WORDS, P, P + 1, P + 1]


def mixed_inputs(plan: StepPlan, split: ContextSplit) -> MixedInputs[np.ndarray]:
    """Return a plan's inputs with their true sizes."""
    D = plan.num_decode
    token_rows, positions, cu_seqlens = flatten_chunks(plan.rows, plan.starts, plan.num_tokens)
    token_ids = np.full(token_rows.size, LAST_TOKEN, dtype=np.int32)
    token_ids[D:] = plan.token_ids
    ends = plan.starts + plan.num_tokens
    cu_seqlens_k = np.zeros(plan.rows.size - D + 1, dtype=np.int32)
    np.cumsum(ends[D:], out=cu_seqlens_k[1:])
    return MixedInputs(
        token_rows,
        positions,
        token_ids,
        ends[:D],
        split.schedule(ends[:D]).reshape(-1),
        plan.rows[D:],
        cu_seqlens[D:],
        cu_seqlens_k,
    )


def padded(
    inputs: MixedInputs[np.ndarray], size: MixedSize, padding_row: int, split: ContextSplit
) -> MixedInputs[np.ndarray]:
    """Pad inputs to a graph's size with tokens of the padding row and chunks without tokens."""
    fills = MixedInputs[int](
        token_rows=padding_row,
        positions=0,
        token_ids=0,
        context_lens=0,
        split_schedule=0,
        chunk_rows=padding_row,
        cu_seqlens_q=inputs.cu_seqlens_q[-1],
        cu_seqlens_k=inputs.cu_seqlens_k[-1],
    )
    return MixedInputs(
        *(
            np.pad(array, (0, num_words - array.size), constant_values=fill)
            for array, num_words, fill in zip(
                inputs.arrays(), upload_sizes(size, split), fills.arrays(), strict=True
            )
        )
    )


def no_inputs() -> MixedInputs[np.ndarray]:
    """Return inputs of a step without tokens; graphs are captured on them after `padded`."""
    nothing, zero = np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int32)
    return MixedInputs(nothing, nothing, nothing, nothing, nothing, nothing, zero, zero)


def flatten_chunks(
    rows: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row and position of every token of a step, on the host.

    Args:
        rows, starts, num_tokens: [S], as in a `StepPlan`.

    Returns:
        row of each token [N], position of each token [N], and the running sum [S + 1] of
        `num_tokens`, all int32.
    """
    cu_seqlens = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(num_tokens, out=cu_seqlens[1:])
    token_rows = np.repeat(rows, num_tokens)
    first = np.repeat(starts - cu_seqlens[:-1], num_tokens)
    positions = first + np.arange(cu_seqlens[-1], dtype=np.int32)
    return token_rows, positions, cu_seqlens
