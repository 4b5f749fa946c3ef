"""The row table: what every row asks of sampling, on the host and on the device.

R rows, S rows that sample, Vl ids on this rank, n entries. A row keeps its record until another
sequence enters it; records of rows that are not scheduled are not read.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.row_record import (
    Lists,
    column,
    field,
    have_options,
    new_records,
    split_lists,
    words_of,
)
from tpllm.channel.step_plan import PlanLimits


@dataclass
class SampledRows:
    """Rows of the table that sample, on the device; equal on every rank.

    Attributes:
        table: [R, row_words()] int32, the records of all rows
        rows: [S] int32
        positions: [S] int32, index of the sampled token in its sequence
    """

    table: Tensor
    rows: Tensor
    positions: Tensor

    def at(self, where: Tensor) -> "SampledRows":
        """Return the rows at indices `where` [n] int64."""
        return SampledRows(self.table, self.rows[where], self.positions[where])

    def first(self, num_rows: int) -> "SampledRows":
        return SampledRows(self.table, self.rows[:num_rows], self.positions[:num_rows])

    def column(self, name: str) -> Tensor:
        """Return a field of each row, contiguous: [S], or [S, n] int32 if it has n words."""
        first, dtype = field(name)
        words = self.table[self.rows, first : first + dtype.itemsize // 4]
        values = words.contiguous().view(torch.float32 if dtype == np.float32 else torch.int32)
        return values.squeeze(1) if dtype.itemsize == 4 else values


@dataclass
class RowLists:
    """Lists of all rows as (row, column) entries, where columns are ids of this rank's slice.

    Attributes:
        bias_values: float32, added to the logit of each entry of `bias`
        banned: entries that must not be sampled before their row's minimum position
        allowed: in rows with such entries, the only ids that may be sampled
        last_of_words: entries of the last tokens of bad words
        words: [n, L] int32, the other tokens of these words, last one first, padded with -1
    """

    bias: tuple[Tensor, Tensor]
    bias_values: Tensor
    banned: tuple[Tensor, Tensor]
    allowed: tuple[Tensor, Tensor]
    last_of_words: tuple[Tensor, Tensor]
    words: Tensor


class RowTable:
    """Records of all rows, and lists and tokens of the rows that have options.

    Args:
        vocab_start, local_vocab_size: this rank's slice of the vocabulary; lists keep only its ids

    Attributes:
        local_vocab_size: Vl
        records: [R] ROW on the host
        words: [R, row_words()] int32, the records on the device, at a fixed address
        tokens: [R, max_tokens_per_seq + 1] int32 on the device: prompt and sampled tokens of the
            rows whose options read them
        lists: on the device
    """

    def __init__(
        self, limits: PlanLimits, vocab_start: int, local_vocab_size: int, device: torch.device
    ) -> None:
        num_rows = limits.max_num_seqs + 1  # one for padding
        self._device = device
        self._vocab_start = vocab_start
        self.local_vocab_size = local_vocab_size
        self.records = new_records(num_rows)
        self.words = upload(words_of(self.records), device)
        # one token more than a row may have: the trial of the largest step samples it
        width = limits.max_tokens_per_seq + 1
        self.tokens = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self._with_options: set[int] = set()
        self._lists: dict[int, Lists] = {}  # of the rows that have some
        self.lists = self._upload_lists()

    @property
    def has_options(self) -> bool:
        """Whether any row asks for more than temperature, seed and stop ids."""
        return bool(self._with_options)

    def enter(self, records: np.ndarray, list_words: np.ndarray) -> None:
        """Note the records [n] of rows that new sequences enter, and upload their lists.

        `store` must follow with the same records.
        """
        if not records.size:
            return
        rows = records["row"].tolist()
        self.records[rows] = records
        self._with_options.difference_update(rows)
        self._with_options.update(records["row"][have_options(records)].tolist())
        changed = any([self._lists.pop(row, None) for row in rows])
        if list_words.size:
            lists = dict(zip(rows, split_lists(records, list_words), strict=True))
            tokens = [(row, each.pop("tokens")) for row, each in lists.items()]
            self._upload_tokens([(row, each) for row, each in tokens if each.size])
            with_lists = {row: each for row, each in lists.items() if any(map(len, each.values()))}
            self._lists |= with_lists
            changed = changed or bool(with_lists)
        if changed:
            self.lists = self._upload_lists()

    def store(self, words: Tensor) -> None:
        """Store the words of uploaded records, flat int32 on the device; may be empty."""
        if words.numel():
            records = words.view(-1, self.words.shape[1])
            self.words.index_copy_(0, records[:, column("row")].long(), records)

    def _upload_tokens(self, entering: list[tuple[int, np.ndarray]]) -> None:
        """Store the tokens of rows in one copy."""
        if not entering:
            return
        width = self.tokens.shape[1]
        places = [row * width + np.arange(tokens.size) for row, tokens in entering]
        tokens = np.concatenate([tokens for _, tokens in entering])
        self.tokens.view(-1).index_copy_(
            0, upload(np.concatenate(places), self._device), upload(tokens, self._device)
        )

    def _upload_lists(self) -> RowLists:
        """Return the lists of all rows; they change only when such a row enters or leaves."""
        bias, banned, allowed, last_of_words = (
            _Entries(self._vocab_start, self.local_vocab_size) for _ in range(4)
        )
        values, words = [np.empty(0, np.float32)], []
        for row, lists in self._lists.items():
            values.append(lists["bias_values"][bias.add(row, lists["bias_ids"])])
            banned.add(row, lists["banned_ids"])
            allowed.add(row, lists["allowed_ids"])
            sequences = np.split(lists["bad_word_ids"], lists["bad_word_ends"])[:-1]
            last = np.array([each[-1] for each in sequences], dtype=np.int32)
            words += [sequences[i][-2::-1] for i in last_of_words.add(row, last)]
        longest = max(map(len, words), default=0)
        table = np.full((len(words), longest), -1, dtype=np.int32)
        for i, word in enumerate(words):
            table[i, : len(word)] = word
        return RowLists(
            bias=bias.upload(self._device),
            bias_values=upload(np.concatenate(values), self._device),
            banned=banned.upload(self._device),
            allowed=allowed.upload(self._device),
            last_of_words=last_of_words.upload(self._device),
            words=upload(table, self._device),
        )


class _Entries:
    """Collects (row, column) entries of one kind, only for ids of this rank's slice."""

    def __init__(self, vocab_start: int, local_vocab_size: int) -> None:
        self._first, self._size = vocab_start, local_vocab_size
        self._rows: list[np.ndarray] = [np.empty(0, np.int64)]
        self._cols: list[np.ndarray] = [np.empty(0, np.int64)]

    def add(self, row: int, ids: np.ndarray) -> np.ndarray:
        """Add ids of a row; return the indices of the ids in this rank's slice."""
        cols = ids.astype(np.int64) - self._first
        kept = np.flatnonzero((cols >= 0) & (cols < self._size))
        self._rows.append(np.full(kept.size, row, dtype=np.int64))
        self._cols.append(cols[kept])
        return kept

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, cols = np.concatenate(self._rows), np.concatenate(self._cols)
        return upload(rows, device), upload(cols, device)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to the device without waiting for the device's earlier work."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host.clone()
    # torch keeps a pinned buffer until the copies from it are done
    return host.pin_memory().to(device, non_blocking=True)
