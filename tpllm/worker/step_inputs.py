"""The integers that a step's forward reads: laid out on the host, uploaded, made a micro-batch.

N tokens: the first D are decode rows of one token each, the others belong to P prefill chunks. A
decode step is a step without chunks: rows and positions say everything, and the device looks up the
rest. Padding is tokens of the padding row and chunks without tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.step_plan import StepPlan
from tpllm.layers.attention.attention import AttentionBatch, PrefillBatch
from tpllm.layers.attention.split_schedule import SPLIT_WORDS, ContextSplit
from tpllm.models.micro_batch import MicroBatch
from tpllm.worker.batch_state import BatchState, gather_decode_inputs
from tpllm.worker.cuda_graphs import StepSize

Array = TypeVar("Array", np.ndarray, Tensor)

LAST_TOKEN = -1


@dataclass
class ChunkInputs(Generic[Array]):
    """What a step with prefill chunks has beyond rows and positions, all int32.

    Attributes:
        context_lens: [D] tokens that each decode row attends to, itself included; 0 for padding
        token_ids: [N] of prompts; LAST_TOKEN for decode rows, whose token is only on the device
        rows: [P] row of each chunk
        cu_seqlens_q: [P + 1] index of each chunk's first token in the step, and the last one's end
        cu_seqlens_k: [P + 1] running sum of the chunks' context lengths
    """

    context_lens: Array
    token_ids: Array
    rows: Array
    cu_seqlens_q: Array
    cu_seqlens_k: Array


@dataclass
class StepInputs(Generic[Array]):
    """A step's integers, all int32, on the host or on the device.

    Attributes:
        token_rows: [N] row of each token
        positions: [N] its index in its sequence
        split_schedule: KV splits of the decode rows, SPLIT_WORDS each: see `ContextSplit`
        chunks: None for a decode step
    """

    token_rows: Array
    positions: Array
    split_schedule: Array
    chunks: ChunkInputs[Array] | None = None

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> "StepInputs[Array]":
        """Return the inputs whose `arrays` are given."""
        chunks: Any = ChunkInputs(*arrays[3:]) if len(arrays) > 3 else None
        return cls(arrays[0], arrays[1], arrays[2], chunks)

    def arrays(self) -> list[Array]:
        """Return the arrays in the order of the attributes, for an upload."""
        chunks: Any = vars(self.chunks).values() if self.chunks else ()
        return [self.token_rows, self.positions, self.split_schedule, *chunks]


@dataclass(frozen=True)
class ChunkLengths:
    """Bounds that the host passes to attention; see `PrefillBatch`."""

    max_seqlen_q: int
    max_seqlen_k: int
    has_context: bool


# ---- on the host -----------------------------------------------------------------------------


def decode_inputs(
    plan: StepPlan,
    num_rows: int,
    padding_row: int,
    split_schedule: Callable[[np.ndarray], np.ndarray],
) -> StepInputs[np.ndarray]:
    """Return a decode step's inputs, padded to `num_rows`; padding attends to one token.

    Args:
        split_schedule: makes a schedule from context lengths
    """
    positions = _padded(plan.starts, num_rows, 0)
    rows = _padded(plan.rows, num_rows, padding_row)
    return StepInputs(rows, positions, split_schedule(positions + 1))


def mixed_inputs(plan: StepPlan, split: ContextSplit) -> StepInputs[np.ndarray]:
    """Return a plan's inputs with their true sizes."""
    D = plan.num_decode
    token_rows, positions, cu_seqlens = flatten_chunks(plan.rows, plan.starts, plan.num_tokens)
    token_ids = np.full(token_rows.size, LAST_TOKEN, dtype=np.int32)
    token_ids[D:] = plan.token_ids
    ends = plan.starts + plan.num_tokens
    cu_seqlens_k = np.zeros(plan.rows.size - D + 1, dtype=np.int32)
    np.cumsum(ends[D:], out=cu_seqlens_k[1:])
    chunks = ChunkInputs(ends[:D], token_ids, plan.rows[D:], cu_seqlens[D:], cu_seqlens_k)
    return StepInputs(token_rows, positions, split.schedule(ends[:D]).reshape(-1), chunks)


def padded(
    inputs: StepInputs[np.ndarray], size: StepSize, padding_row: int, split: ContextSplit
) -> StepInputs[np.ndarray]:
    """Pad the inputs of a mixed step; padding decode rows attend to no token."""
    assert inputs.chunks
    ends = (inputs.chunks.cu_seqlens_q[-1], inputs.chunks.cu_seqlens_k[-1])
    fills = (padding_row, 0, 0, 0, 0, padding_row, *ends)
    arrays = zip(inputs.arrays(), upload_sizes(size, split), fills, strict=True)
    return StepInputs.of([_padded(*each) for each in arrays])


def _padded(array: np.ndarray, num_words: int, fill: int) -> np.ndarray:
    if array.size == num_words:
        return array
    out = np.full(num_words, fill, dtype=np.int32)
    out[: array.size] = array
    return out


def upload_sizes(size: StepSize, split: ContextSplit) -> list[int]:
    """Return the number of words of each array of inputs that are padded to `size`."""
    N, D, P = size
    chunks = [D, N, P, P + 1, P + 1] if P else []
    return [N, N, split.num_splits(D) * SPLIT_WORDS, *chunks]


def chunk_lengths(plan: StepPlan) -> ChunkLengths:
    """Return the true lengths of a plan's chunks."""
    starts, num_tokens = plan.starts[plan.num_decode :], plan.num_tokens[plan.num_decode :]
    longest = int((starts + num_tokens).max(initial=0))
    return ChunkLengths(int(num_tokens.max(initial=0)), longest, bool(starts.any()))


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


# ---- on the device ---------------------------------------------------------------------------


def micro_batch(inputs: StepInputs[Tensor], state: BatchState, lengths: ChunkLengths) -> MicroBatch:
    """Return the micro-batch of uploaded inputs.

    That of a decode step lies in `state.decode_inputs`, filled by one kernel, because a small step
    is as short as a dozen kernels.
    """
    rows, positions, chunks = inputs.token_rows, inputs.positions, inputs.chunks
    prefill = None
    if chunks is None:
        D = rows.numel()
        gathered = state.decode_inputs(D)
        gather_decode_inputs(state, rows, positions, gathered)
        input_ids, slots = gathered.input_ids, gathered.slots
        context_lens, block_tables = gathered.context_lens, gathered.block_tables
    else:
        D = chunks.context_lens.numel()
        if chunks.rows.numel():
            prefill = PrefillBatch(
                cu_seqlens_q=chunks.cu_seqlens_q,
                cu_seqlens_k=chunks.cu_seqlens_k,
                block_tables=state.block_tables[chunks.rows],
                **vars(lengths),
            )
        is_last = chunks.token_ids == LAST_TOKEN
        input_ids = torch.where(is_last, state.last_tokens[rows], chunks.token_ids)
        slots = state.slots(rows, positions)
        context_lens, block_tables = chunks.context_lens, state.block_tables[rows[:D]]
    batch = AttentionBatch(
        slot_mapping=slots,
        num_decode=D,
        context_lens=context_lens,
        block_tables=block_tables,
        split_schedule=inputs.split_schedule.view(-1, SPLIT_WORDS),
        prefill=prefill,
    )
    return MicroBatch(input_ids, positions, batch)
