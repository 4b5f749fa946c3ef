"""The state of the batch on the device: one row per running sequence, updated by deltas.

R rows. The last row is reserved for padding: if a CUDA graph's size is larger than the batch, its
padding rows use this row and the reserved cache block, and need no special case.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.channel.step_plan import MAX_MASKED_STOP_IDS, RESERVED_BLOCK, ROW_STATE_WORDS
from tpllm.sampling.sampler import SamplingBatch

# words of a row's state, as `step_plan` lays them out
_TEMPERATURE, _SEED, _MIN_POSITION, _STOP_IDS = 0, 1, 3, 4


class BatchState:
    """Block tables, sampling settings and last tokens of every row, on the device.

    Args:
        num_rows: rows for sequences; one more row is reserved for padding.
        max_blocks: width of a block table.
        block_size: tokens per cache block.
    """

    def __init__(
        self, num_rows: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.padding_row = num_rows
        self.block_size = block_size
        self.block_tables = _zeros(num_rows + 1, max_blocks, device=device) + RESERVED_BLOCK
        self.row_state = _zeros(num_rows + 1, ROW_STATE_WORDS, device=device)
        self.last_tokens = _zeros(num_rows + 1, device=device)

    def apply(self, entering: Tensor, block_updates: Tensor) -> None:
        """Apply a plan's changes.

        Args:
            entering: flat [n * ENTERING_WORDS] int32; may be empty.
            block_updates: flat [m * 2] int32; may be empty.
        """
        if entering.numel():
            words = entering.view(-1, 1 + ROW_STATE_WORDS)
            self.row_state.index_copy_(0, words[:, 0].long(), words[:, 1:])
        if block_updates.numel():
            pairs = block_updates.view(-1, 2)
            # entries of a row's last sequence remain beyond the new block table; an update
            # overwrites them before they are read
            self.block_tables.view(-1).index_copy_(0, pairs[:, 0].long(), pairs[:, 1])

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the cache slot of each token: rows [N], positions [N] -> [N] int32."""
        blocks = self.block_tables[rows, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def sampling(self, rows: Tensor, positions: Tensor) -> SamplingBatch:
        """Return sampling settings of `rows` [S] for the tokens at `positions` [S]."""
        state = self.row_state[rows]  # [S, words]
        # copies, even of one row: kernels are compiled for addresses that 16 divides
        return SamplingBatch(
            temperatures=state[:, _TEMPERATURE].clone().view(torch.float32),
            seeds=state[:, _SEED : _SEED + 2].clone(),
            positions=positions,
            min_positions=state[:, _MIN_POSITION].clone(),
            stop_ids=state[:, _STOP_IDS:].clone(),
        )


@dataclass
class DecodeInputs:
    """Inputs of a decode step of S rows, at fixed addresses for its CUDA graph."""

    rows: Tensor  # [S] int32
    positions: Tensor  # [S] int32, of the input token
    split_schedule: Tensor  # [splits, SPLIT_WORDS] int32: see `ContextSplit`
    input_ids: Tensor  # [S] int32
    slots: Tensor  # [S] int32
    context_lens: Tensor  # [S] int32, including the input token
    block_tables: Tensor  # [S, B] int32
    sampling: SamplingBatch

    @classmethod
    def empty(
        cls,
        rows: Tensor,
        positions: Tensor,
        split_schedule: Tensor,
        max_blocks: int,
        device: torch.device,
    ) -> "DecodeInputs":
        """Allocate buffers for given rows, positions and schedule: views of the upload buffer."""
        S = rows.numel()
        context_lens = _zeros(S, device=device)
        sampling = SamplingBatch(
            temperatures=torch.zeros(S, device=device),
            seeds=_zeros(S, 2, device=device),
            positions=context_lens,  # the new token's index is the number of tokens before it
            min_positions=_zeros(S, device=device),
            stop_ids=_zeros(S, MAX_MASKED_STOP_IDS, device=device),
        )
        return cls(
            rows=rows,
            positions=positions,
            split_schedule=split_schedule,
            input_ids=_zeros(S, device=device),
            slots=_zeros(S, device=device),
            context_lens=context_lens,
            block_tables=_zeros(S, max_blocks, device=device),
            sampling=sampling,
        )

    def first(self, rows: Tensor, positions: Tensor, split_schedule: Tensor) -> "DecodeInputs":
        """Return the same buffers for fewer rows, with arguments as of `empty`.

        Sizes can share buffers because steps run one after the other.
        """
        S = rows.numel()
        context_lens = self.context_lens[:S]
        sampling = SamplingBatch(
            temperatures=self.sampling.temperatures[:S],
            seeds=self.sampling.seeds[:S],
            positions=context_lens,
            min_positions=self.sampling.min_positions[:S],
            stop_ids=self.sampling.stop_ids[:S],
        )
        return DecodeInputs(
            rows=rows,
            positions=positions,
            split_schedule=split_schedule,
            input_ids=self.input_ids[:S],
            slots=self.slots[:S],
            context_lens=context_lens,
            block_tables=self.block_tables[:S],
            sampling=sampling,
        )


def gather_decode_inputs_reference(state: BatchState, inputs: DecodeInputs) -> None:
    """Plain torch version of `gather_decode_inputs`."""
    rows, positions = inputs.rows, inputs.positions
    inputs.input_ids.copy_(state.last_tokens[rows])
    inputs.slots.copy_(state.slots(rows, positions))
    inputs.context_lens.copy_(positions + 1)
    inputs.block_tables.copy_(state.block_tables[rows])
    sampling = state.sampling(rows, inputs.context_lens)
    inputs.sampling.temperatures.copy_(sampling.temperatures)
    inputs.sampling.seeds.copy_(sampling.seeds)
    inputs.sampling.min_positions.copy_(sampling.min_positions)
    inputs.sampling.stop_ids.copy_(sampling.stop_ids)


@triton.jit
def _gather_decode_inputs_kernel(
    rows_ptr: tl.tensor,  # [S]
    positions_ptr: tl.tensor,  # [S]
    last_tokens_ptr: tl.tensor,  # [R]
    tables_ptr: tl.tensor,  # [R, B]
    state_ptr: tl.tensor,  # [R, STATE_WORDS]
    input_ids_ptr: tl.tensor,  # [S], like the pointers that follow
    slots_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_tables_ptr: tl.tensor,  # [S, B]
    temperatures_ptr: tl.tensor,
    seeds_ptr: tl.tensor,  # [S, 2]
    min_positions_ptr: tl.tensor,
    stop_ids_ptr: tl.tensor,  # [S, STOP_IDS]
    max_blocks: tl.tensor,
    block_size: tl.tensor,
    STATE_WORDS: tl.constexpr,
    STOP_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copy the inputs of one row; one program per row of the batch."""
    s = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + s).to(tl.int64)
    position = tl.load(positions_ptr + s)
    table_ptr = tables_ptr + row * max_blocks

    tl.store(input_ids_ptr + s, tl.load(last_tokens_ptr + row))
    block = tl.load(table_ptr + position // block_size)
    tl.store(slots_ptr + s, block * block_size + position % block_size)
    tl.store(context_lens_ptr + s, position + 1)

    row_state_ptr = state_ptr + row * STATE_WORDS
    tl.store(temperatures_ptr + s, tl.load(row_state_ptr))  # copied as bits
    tl.store(seeds_ptr + 2 * s, tl.load(row_state_ptr + 1))
    tl.store(seeds_ptr + 2 * s + 1, tl.load(row_state_ptr + 2))
    tl.store(min_positions_ptr + s, tl.load(row_state_ptr + 3))
    stops = tl.arange(0, STOP_IDS)
    tl.store(stop_ids_ptr + s * STOP_IDS + stops, tl.load(row_state_ptr + 4 + stops))

    first = 0
    while first < max_blocks:  # Triton's interpreter has no range() over an argument
        columns = first + tl.arange(0, BLOCK)
        mask = columns < max_blocks
        entries = tl.load(table_ptr + columns, mask=mask)
        tl.store(out_tables_ptr + s * max_blocks + columns, entries, mask=mask)
        first += BLOCK


def gather_decode_inputs(state: BatchState, inputs: DecodeInputs) -> None:
    """Fill `inputs` for its rows and positions from `state`, with one kernel and no host data."""
    sampling = inputs.sampling
    _gather_decode_inputs_kernel[(inputs.rows.numel(),)](
        inputs.rows,
        inputs.positions,
        state.last_tokens,
        state.block_tables,
        state.row_state,
        inputs.input_ids,
        inputs.slots,
        inputs.context_lens,
        inputs.block_tables,
        sampling.temperatures.view(torch.int32),
        sampling.seeds,
        sampling.min_positions,
        sampling.stop_ids,
        state.block_tables.shape[1],
        state.block_size,
        STATE_WORDS=ROW_STATE_WORDS,
        STOP_IDS=MAX_MASKED_STOP_IDS,
        BLOCK=128,
    )


def _zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)
