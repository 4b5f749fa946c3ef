"""Sampling options of rows beyond the temperature, kept on the host and on the device.

R rows, Vl ids on this rank, n entries. Rows without options cost nothing here. A row keeps its
options until another sequence enters it; options of a row that is not scheduled are not read.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.row_options import EnteringOptions, RowOptions, read_records
from tpllm.channel.step_plan import PlanLimits

# words of a row's settings
_PROMPT_LENGTH, _TOP_K, _TOP_P, _MIN_P, _PENALTIES = 0, 1, 2, 3, 4
_SETTING_WORDS = 7


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


class OptionTable:
    """Options of the rows, with settings and tokens of the rows that have options.

    Args:
        vocab_start, local_vocab_size: this rank's slice of the vocabulary; lists keep only its ids

    Attributes:
        local_vocab_size: Vl
        tokens: [R, max_tokens_per_seq + 1] int32 on the device: prompt and sampled tokens of the
            rows whose options read them
        lists: None if no row has any
    """

    def __init__(
        self, limits: PlanLimits, vocab_start: int, local_vocab_size: int, device: torch.device
    ) -> None:
        num_rows = limits.max_num_seqs + 1  # one for padding
        self._device = device
        self._vocab_start = vocab_start
        self.local_vocab_size = local_vocab_size
        self._options: dict[int, RowOptions] = {}
        self._settings = torch.zeros(num_rows, _SETTING_WORDS, dtype=torch.int32, device=device)
        # one token more than a row may have: the trial of the largest step samples it
        width = limits.max_tokens_per_seq + 1
        self.tokens = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self.lists: RowLists | None = None

    def __len__(self) -> int:
        return len(self._options)

    def of(self, row: int) -> RowOptions | None:
        """Return the options of `row`, or None if it has none."""
        return self._options.get(row)

    def enter(self, rows: np.ndarray, records: np.ndarray) -> None:
        """Replace the options of `rows` [n], which new sequences enter; most have no options."""
        if not rows.size or not (records.size or self._options):
            return
        leaving = [self._options.pop(row, None) for row in rows.tolist()]
        entering = list(read_records(records))
        self._options |= {each.row: each.options for each in entering}
        if entering:
            self._upload_settings(entering)
            self._upload_tokens([each for each in entering if each.tokens.size])
        changed = [*leaving, *(each.options for each in entering)]
        if any(options is not None and options.has_lists for options in changed):
            self._upload_lists()

    def _upload_settings(self, entering: list[EnteringOptions]) -> None:
        words = np.empty((len(entering), 1 + _SETTING_WORDS), dtype=np.int32)
        for i, (row, options, _) in enumerate(entering):
            words[i, :3] = row, options.num_prompt_tokens, options.top_k
            words[i, 3:] = np.array(
                [
                    options.top_p,
                    options.min_p,
                    options.repetition_penalty,
                    options.frequency_penalty,
                    options.presence_penalty,
                ],
                dtype=np.float32,
            ).view(np.int32)
        uploaded = upload(words, self._device)
        self._settings.index_copy_(0, uploaded[:, 0].long(), uploaded[:, 1:])

    def _upload_tokens(self, entering: list[EnteringOptions]) -> None:
        if not entering:
            return
        tokens = np.concatenate([each.tokens for each in entering])
        width = self.tokens.shape[1]
        places = np.concatenate(
            [each.row * width + np.arange(each.tokens.size, dtype=np.int64) for each in entering]
        )
        flat = self.tokens.view(-1)
        flat.index_copy_(0, upload(places, self._device), upload(tokens, self._device))

    def _upload_lists(self) -> None:
        """Rebuild `lists`, which changes only when a row with lists enters or leaves."""
        with_lists = {row: each for row, each in self._options.items() if each.has_lists}
        self.lists = None
        if not with_lists:
            return
        bias, banned, allowed, last_of_words = (
            _Entries(self._vocab_start, self.local_vocab_size) for _ in range(4)
        )
        values, words = [np.empty(0, np.float32)], []
        for row, options in with_lists.items():
            values.append(options.bias_values[bias.add(row, options.bias_ids)])
            banned.add(row, options.banned_ids)
            allowed.add(row, options.allowed_ids)
            sequences = np.split(options.bad_word_ids, options.bad_word_ends)[:-1]
            last = np.array([each[-1] for each in sequences], dtype=np.int32)
            words += [sequences[i][-2::-1] for i in last_of_words.add(row, last)]
        longest = max(map(len, words), default=0)
        table = np.full((len(words), longest), -1, dtype=np.int32)
        for i, word in enumerate(words):
            table[i, : len(word)] = word
        self.lists = RowLists(
            bias=bias.upload(self._device),
            bias_values=upload(np.concatenate(values), self._device),
            banned=banned.upload(self._device),
            allowed=allowed.upload(self._device),
            last_of_words=last_of_words.upload(self._device),
            words=upload(table, self._device),
        )

    # ---- settings of rows on the device -----------------------------------------------------

    def prompt_lengths(self, rows: Tensor) -> Tensor:
        """Return the number of prompt tokens of each row: rows [n] -> [n] int64."""
        return self._settings[rows, _PROMPT_LENGTH].long()

    def truncations(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return top_k [n] int32, top_p [n] and min_p [n] float32 of `rows` [n]."""
        settings = self._settings[rows]
        # copies, because kernels are compiled for addresses that 16 divides: a column is not at
        # such an address, even where a single row makes it contiguous
        top_k, top_p, min_p = (settings[:, i].clone() for i in (_TOP_K, _TOP_P, _MIN_P))
        return top_k, top_p.view(torch.float32), min_p.view(torch.float32)

    def penalties(self, rows: Tensor) -> Tensor:
        """Return repetition, frequency and presence penalty of `rows` [n]: [n, 3] float32."""
        return self._settings[rows, _PENALTIES:].contiguous().view(torch.float32)


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
