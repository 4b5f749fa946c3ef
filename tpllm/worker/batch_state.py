"""The state of the batch on the device: one row per running sequence, updated by deltas.

R rows. The last row is reserved for padding: if a CUDA graph's size is larger than the batch, its
padding rows use this row and the reserved cache block, and need no special case.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpllm.channel.step_plan import RESERVED_BLOCK


class BatchState:
    """Block tables and last tokens of every row, on the device.

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
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self.block_tables = zeros(num_rows + 1, max_blocks) + RESERVED_BLOCK
        self.last_tokens = zeros(num_rows + 1)
        tables = zeros(num_rows, max_blocks)
        self._decode_inputs = DecodeInputs(
            zeros(num_rows), zeros(num_rows), zeros(num_rows), tables
        )

    def decode_inputs(self, num_rows: int) -> "DecodeInputs":
        """Return the buffers of a decode step. All steps share them: they run one by one."""
        return DecodeInputs(*(x[:num_rows] for x in vars(self._decode_inputs).values()))

    def apply(self, block_updates: Tensor) -> None:
        """Apply a plan's changes of block tables, flat [m * 2] int32."""
        pairs = block_updates.view(-1, 2)
        # entries of a row's last sequence remain beyond the new block table; an update
        # overwrites them before they are read
        self.block_tables.view(-1).index_copy_(0, pairs[:, 0].long(), pairs[:, 1])

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the cache slot of each token: rows [N], positions [N] -> [N] int32."""
        blocks = self.block_tables[rows, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


@dataclass
class DecodeInputs:
    """Inputs of a decode step of S rows, gathered into buffers at fixed addresses."""

    input_ids: Tensor  # [S] int32
    slots: Tensor  # [S] int32
    context_lens: Tensor  # [S] int32, including the input token
    block_tables: Tensor  # [S, B] int32


def gather_decode_inputs_reference(
    state: BatchState, rows: Tensor, positions: Tensor, out: DecodeInputs
) -> None:
    """Plain torch version of `gather_decode_inputs_triton`."""
    out.input_ids.copy_(state.last_tokens[rows])
    out.slots.copy_(state.slots(rows, positions))
    out.context_lens.copy_(positions + 1)
    out.block_tables.copy_(state.block_tables[rows])


@triton.jit
def _gather_decode_inputs_kernel(
    rows_ptr: tl.tensor,  # [S]
    positions_ptr: tl.tensor,  # [S]
    last_tokens_ptr: tl.tensor,  # [R]
    tables_ptr: tl.tensor,  # [R, B]
    input_ids_ptr: tl.tensor,  # [S], like the pointers that follow
    slots_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_tables_ptr: tl.tensor,  # [S, B]
    max_blocks: tl.tensor,
    block_size: tl.tensor,
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

    first = 0
    while first < max_blocks:  # Triton's interpreter has no range() over an argument
        columns = first + tl.arange(0, BLOCK)
        mask = columns < max_blocks
        entries = tl.load(table_ptr + columns, mask=mask)
        tl.store(out_tables_ptr + s * max_blocks + columns, entries, mask=mask)
        first += BLOCK


def gather_decode_inputs_triton(
    state: BatchState, rows: Tensor, positions: Tensor, out: DecodeInputs
) -> None:
    """Fill `out` for the input tokens at `positions` [S] of `rows` [S], without host data."""
    _gather_decode_inputs_kernel[(rows.numel(),)](
        rows,
        positions,
        state.last_tokens,
        state.block_tables,
        out.input_ids,
        out.slots,
        out.context_lens,
        out.block_tables,
        state.block_tables.shape[1],
        state.block_size,
        BLOCK=128,
    )


def gather_decode_inputs(
    state: BatchState, rows: Tensor, positions: Tensor, out: DecodeInputs
) -> None:
    """Run the kernel on a GPU and the reference elsewhere; see `gather_decode_inputs_triton`."""
    gather = gather_decode_inputs_triton if rows.is_cuda else gather_decode_inputs_reference
    gather(state, rows, positions, out)
