"""Rows that sample, with given fields of their records."""

from typing import Any

import torch
from torch import Tensor

from tpllm.channel.row_record import new_records, words_of
from tpllm.sampling.row_table import SampledRows, upload


def sampled_rows(positions: Tensor, **fields: Any) -> SampledRows:
    """Return rows 0 .. S - 1 of a new table that sample at `positions` [S], on their device.

    Args:
        fields: values of a field of `ROW`, one for each row or one for all
    """
    records = new_records(len(positions))
    for name, values in fields.items():
        records[name] = values
    table = upload(words_of(records), positions.device)
    rows = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
    return SampledRows(table, rows, positions)
