"""Logits processors: each option that changes the logits before a token is sampled from them.

P rows of scores, Vl ids on this rank. Processors run in vLLM's order, which `PROCESSORS` states;
each changes the scores of the rows that ask for it, in place. A new option of this kind is a field
of `ROW` and a processor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.row_record import PENALTIES, TRUNCATIONS, differ, list_sizes
from tpllm.parallel.group import TPGroup
from tpllm.sampling.logit_changes import add_at, ends_with, keep_only, penalize
from tpllm.sampling.row_table import RowTable, SampledRows, upload
from tpllm.sampling.thresholds import Truncation
from tpllm.sampling.token_masks import MASK_BITS, keep_masked
from tpllm.sampling.truncation import truncate

# Tokens of rows with penalties that are processed at once, at about 30 bytes each.
MAX_TOKENS = 1 << 22


@dataclass
class ChangedRows:
    """P rows of a step whose options change their logits.

    Attributes:
        scores: [P, Vl] float32, as `scores_of` returns them
        records: [P] ROW, on the host
        positions: [P] position of each sampled token, on the host
        masks: [w] int32 words that cover this rank's slice, by index of the row that has a mask
        rows: the same rows, on the device
        vocab_start: id of the slice's first column
    """

    scores: Tensor
    records: np.ndarray
    positions: np.ndarray
    masks: dict[int, np.ndarray]
    rows: SampledRows
    table: RowTable
    vocab_start: int
    tp: TPGroup

    @cached_property
    def slots(self) -> Tensor:
        """Return the index in `scores` of every row of the table, -1 for others: [R] int64."""
        slots = torch.full((len(self.table.records),), -1, device=self.scores.device)
        rows = self.rows.rows.long()
        slots[rows] = torch.arange(len(rows), device=rows.device)
        return slots

    def upload(self, indices: np.ndarray | list[int]) -> Tensor:
        return upload(np.array(indices, dtype=np.int64), self.scores.device)


class Processor(NamedTuple):
    """An option that changes logits.

    Attributes:
        asks: returns which records [n] ask for it: [n] bool
        apply: changes the scores of the rows at the given indices, which ask for it
    """

    asks: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[ChangedRows, np.ndarray], None]


def keep_mask(changed: ChangedRows, where: np.ndarray) -> None:
    masked = [i for i in where.tolist() if i in changed.masks]
    if masked:  # a row without a mask has ended, and its token is dropped
        words = upload(np.stack([changed.masks[i] for i in masked]), changed.scores.device)
        shift = changed.vocab_start % MASK_BITS
        keep_masked(changed.scores, changed.upload(masked), words, shift)


def keep_allowed_ids(changed: ChangedRows, where: np.ndarray) -> None:
    rows, cols = changed.table.lists.allowed
    keep_only(changed.scores, changed.upload(where), changed.slots[rows], cols)


def ban_bad_words(changed: ChangedRows, where: np.ndarray) -> None:
    lists, table = changed.table.lists, changed.table
    rows, last = lists.last_of_words
    if not len(rows):  # all of them end in another rank's ids
        return
    slots = changed.slots[rows]
    of_words = SampledRows(table.words, rows, changed.rows.positions[slots])
    found = ends_with(
        table.tokens,
        rows,
        of_words.positions.long(),  # of another row if the word's row is not in the step
        of_words.column("num_prompt_tokens").long(),
        lists.words,
    )
    add_at(changed.scores, slots.masked_fill(~found, -1), last, -torch.inf)


def ban_early_ends(changed: ChangedRows, where: np.ndarray) -> None:
    rows, cols = changed.table.lists.banned
    slots = changed.slots[rows]
    early = (changed.rows.positions < changed.rows.column("min_position"))[slots]
    add_at(changed.scores, slots.masked_fill(~early, -1), cols, -torch.inf)


def add_biases(changed: ChangedRows, where: np.ndarray) -> None:
    rows, cols = changed.table.lists.bias
    add_at(changed.scores, changed.slots[rows], cols, changed.table.lists.bias_values)


def apply_penalties(changed: ChangedRows, where: np.ndarray) -> None:
    longest = int(changed.positions[where].max())
    for here in changed.upload(where).split(max(1, MAX_TOKENS // longest)):
        rows = changed.rows.at(here)
        penalize(
            changed.scores,
            here,
            changed.table.tokens[rows.rows, :longest],
            rows.positions.long(),
            rows.column("num_prompt_tokens").long(),
            torch.stack([rows.column(name) for name in PENALTIES], dim=1),
            changed.vocab_start,
        )


def keep_likeliest(changed: ChangedRows, where: np.ndarray) -> None:
    values = (
        changed.rows.column(name) if differ(changed.records, (name,)).any() else None
        for name in TRUNCATIONS
    )
    truncation = Truncation(changed.rows.column("temperature"), *values)
    truncate(changed.scores, truncation, changed.vocab_start, changed.tp)


def _has(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda records: list_sizes(records, name) > 0


PROCESSORS = (
    Processor(lambda records: records["is_masked"] == 1, keep_mask),
    Processor(_has("allowed_ids"), keep_allowed_ids),
    Processor(_has("bad_word_ids"), ban_bad_words),
    Processor(_has("banned_ids"), ban_early_ends),
    Processor(_has("bias_ids"), add_biases),
    Processor(lambda records: differ(records, PENALTIES), apply_penalties),
    Processor(lambda records: differ(records, TRUNCATIONS), keep_likeliest),
)
