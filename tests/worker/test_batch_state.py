"""The state of the batch on the device: applying deltas, gathering a decode step's inputs."""

import numpy as np
import pytest
import torch

from tpllm.worker.batch_state import (
    BatchState,
    gather_decode_inputs_reference,
    gather_decode_inputs_triton,
)
from tpllm.worker.staging import HostStaging

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def filled_state(max_blocks: int, device: str) -> BatchState:
    """Return five rows and the padding row, where neighbouring words differ."""
    state = BatchState(5, max_blocks, 16, torch.device(device))
    tables = state.block_tables
    tables.copy_(torch.arange(100, 100 + tables.numel(), dtype=torch.int32).view_as(tables))
    state.last_tokens.copy_(torch.arange(7, 13, dtype=torch.int32))
    return state


def test_deltas_reach_their_rows_and_no_others() -> None:
    state = BatchState(3, 4, 16, torch.device("cpu"))
    updates = torch.tensor([2 * 4 + 0, 9, 2 * 4 + 3, 8, 0, 7], dtype=torch.int32)
    state.apply(updates)
    assert state.block_tables.tolist() == [[7, 0, 0, 0], [0] * 4, [9, 0, 0, 8], [0] * 4]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_blocks", [1, 7, 300])
def test_gather_matches_its_reference(max_blocks: int, device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernel is compiled for it")
    state = filled_state(max_blocks, device)
    rows = torch.tensor([3, 0, 5, 5, 1], dtype=torch.int32, device=device)
    last = 16 * max_blocks - 1
    positions = torch.tensor([last, 0, 0, 0, last // 2], dtype=torch.int32, device=device)

    def gathered(gather) -> list[torch.Tensor]:
        inputs = filled_state(max_blocks, device).decode_inputs(5)
        gather(state, rows, positions, inputs)
        return [inputs.input_ids, inputs.slots, inputs.context_lens, inputs.block_tables]

    expected = gathered(gather_decode_inputs_reference)
    for ours, theirs in zip(gathered(gather_decode_inputs_triton), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert expected[0].tolist() == [10, 7, 12, 12, 8]
    assert expected[1][0] == state.block_tables[3, -1] * 16 + 15


@pytest.mark.parametrize("device", DEVICES)
def test_uploads_keep_their_order_and_alignment(device: str) -> None:
    staging = HostStaging(64, torch.device(device))
    rng = np.random.default_rng(0)
    for _ in range(10):  # more uploads than pinned buffers
        arrays = [rng.integers(0, 99, size, dtype=np.int32) for size in (3, 0, 5, 1)]
        views = [staging.buffer[where] for where in staging.send(arrays)]
        assert [view.tolist() for view in views] == [array.tolist() for array in arrays]
        assert torch.equal(views[2], staging.views([3, 0, 5])[2])
        assert all(view.data_ptr() % 16 == 0 for view in views)
