"""The row table: records on the device are those that entered, and fields are read as they are."""

import numpy as np
import pytest
import torch

from tests.sampling.records import sampled_rows
from tpllm.channel.row_record import MAX_STOP_IDS, ROW, new_records, words_of
from tpllm.channel.step_plan import PlanLimits
from tpllm.sampling.row_table import RowTable, upload

LIMITS = PlanLimits(3, 100, 4, 16, 50, max_logprobs=20)


def test_records_reach_their_rows_and_no_others() -> None:
    table = RowTable(LIMITS, 0, 50, torch.device("cpu"))
    before = table.words.clone()
    records = new_records(2)
    records["row"], records["seed"], records["top_p"] = [2, 0], 2**64 - 3, 0.3
    table.enter(records, np.empty(0, np.int32))
    table.store(upload(words_of(records), table.words.device).flatten())
    assert table.words[[2, 0]].tolist() == words_of(records).tolist()
    assert torch.equal(table.words[[1, 3]], before[[1, 3]])
    assert table.records[[2, 0]].tobytes() == records.tobytes()


def test_fields_are_read_as_bits() -> None:
    stops = [5, 6] + [-1] * (MAX_STOP_IDS - 2)
    rows = sampled_rows(
        torch.zeros(1).int(), temperature=0.6, seed=2**64 - 3, min_position=40, stop_ids=[stops]
    )
    assert rows.column("temperature").tolist() == [pytest.approx(0.6)]
    assert rows.column("seed").tolist() == np.array([[2**64 - 3]], "<u8").view("<i4").tolist()
    assert rows.column("min_position").tolist() == [40]
    assert rows.column("stop_ids").tolist() == [stops]


@pytest.mark.parametrize("num_rows", [1, 3])
def test_fields_are_contiguous_and_aligned(num_rows: int) -> None:
    """Kernels are compiled for addresses that 16 divides."""
    rows = sampled_rows(torch.zeros(num_rows).int())
    for name in ROW.names or ():
        column = rows.column(name)
        assert column.is_contiguous() and column.data_ptr() % 16 == 0
