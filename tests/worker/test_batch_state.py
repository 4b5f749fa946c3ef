"""The state of the batch on the device: applying deltas, gathering a decode step's inputs."""

import numpy as np
import pytest
import torch

from tpllm.channel.step_plan import MAX_MASKED_STOP_IDS, ROW_STATE_WORDS
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
    for tensor, start in ((state.block_tables, 100), (state.row_state, 5000)):
        numbers = torch.arange(start, start + tensor.numel(), dtype=torch.int32)
        tensor.copy_(numbers.view_as(tensor))
    state.last_tokens.copy_(torch.arange(7, 13, dtype=torch.int32))
    return state


def test_deltas_reach_their_rows_and_no_others() -> None:
    state = BatchState(3, 4, 16, torch.device("cpu"))
    words = torch.arange(1, 1 + ROW_STATE_WORDS, dtype=torch.int32)
    entering = torch.cat([torch.tensor([2], dtype=torch.int32), words])
    updates = torch.tensor([2 * 4 + 0, 9, 2 * 4 + 3, 8, 0, 7], dtype=torch.int32)
    state.apply(entering, updates)
    assert state.row_state.tolist() == [[0] * ROW_STATE_WORDS] * 2 + [words.tolist()] + [
        [0] * ROW_STATE_WORDS
    ]
    assert state.block_tables.tolist() == [[7, 0, 0, 0], [0] * 4, [9, 0, 0, 8], [0] * 4]


def test_sampling_settings_are_copied_as_bits() -> None:
    state = BatchState(2, 4, 16, torch.device("cpu"))
    seed = np.array([2**64 - 3], dtype="<u8").view("<i4").tolist()
    temperature = int(np.float32(0.6).view(np.int32))
    stops = [5, 6] + [-1] * (MAX_MASKED_STOP_IDS - 2)
    entering = torch.tensor([1, temperature, *seed, 40, *stops], dtype=torch.int32)
    state.apply(entering, entering[:0])
    batch = state.sampling(torch.tensor([1]), torch.tensor([39], dtype=torch.int32))
    assert batch.temperatures.tolist() == [pytest.approx(0.6)]
    assert batch.seeds.tolist() == [seed]
    assert batch.min_positions.tolist() == [40]
    assert batch.stop_ids.tolist() == [stops]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_sampling_settings_are_contiguous_and_aligned(num_rows: int) -> None:
    rows = torch.arange(num_rows)
    batch = filled_state(4, "cpu").sampling(rows, rows.int())
    for setting in (batch.temperatures, batch.seeds, batch.min_positions, batch.stop_ids):
        assert setting.is_contiguous() and setting.data_ptr() % 16 == 0


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
        sampling = inputs.sampling
        return [
            inputs.input_ids,
            inputs.slots,
            inputs.context_lens,
            inputs.block_tables,
            sampling.temperatures.view(torch.int32),
            sampling.seeds,
            sampling.min_positions,
            sampling.stop_ids,
            sampling.positions,
        ]

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
        views = staging.upload(arrays)
        assert [view.tolist() for view in views] == [array.tolist() for array in arrays]
        assert torch.equal(views[2], staging.views([3, 0, 5])[2])
        assert all(view.data_ptr() % 16 == 0 for view in views)
