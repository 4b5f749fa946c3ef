"""What rows ask for beyond a temperature: as the host must know it, and as the device uses it.

R rows, Vl ids on this rank, n entries. Rows without options cost nothing here. A row keeps its
options until another sequence enters it; nobody asks for those of a row that is not scheduled.
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
    """Lists of all rows as entries (row, column), columns being ids of this rank's slice.

    Attributes:
        bias_values: float32, added to the logit of each entry of `bias`
        banned: entries that cannot be drawn before their row's minimum position
        allowed: entries that alone can be drawn in their rows
        words: [n, L] int32, bad words from their last but one token backwards, padded with -1, for
            the entries of `last_of_words`, their last tokens
    """

    bias: tuple[Tensor, Tensor]
    bias_values: Tensor
    banned: tuple[Tensor, Tensor]
    allowed: tuple[Tensor, Tensor]
    last_of_words: tuple[Tensor, Tensor]
    words: Tensor


class OptionTable:
    """Options of the rows, settings and tokens of those that have some.

    Args:
        vocab_start, local_vocab_size: this rank's slice of the vocabulary; lists keep no other ids.

    Attributes:
        local_vocab_size: Vl
        tokens: [R, max_tokens_per_seq + 1] int32 on the device: of rows that read their tokens,
            those of the prompt and all that were drawn
        lists: None where no row has any
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
        # one token more than a row may have: the trial of the largest step draws it
        width = limits.max_tokens_per_seq + 1
        self.tokens = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
        self.lists: RowLists | None = None

    def __len__(self) -> int:
        return len(self._options)

    def of(self, row: int) -> RowOptions | None:
        return self._options.get(row)

    def enter(self, rows: np.ndarray, records: np.ndarray) -> None:
        """Take in the options of `rows` [n], which new sequences take over; most have none."""
        if not rows.size or not (records.size or self._options):
            return
        left = [self._options.pop(row, None) for row in rows.tolist()]
        entering = list(read_records(records))
        self._options |= {each.row: each.options for each in entering}
        if entering:
            self._upload_settings(entering)
            self._upload_tokens([each for each in entering if each.tokens.size])
        changed = [*left, *(each.options for each in entering)]
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
        """All rows' lists anew: a row's lists come and go only with the row."""
        having = {row: each for row, each in self._options.items() if each.has_lists}
        self.lists = None
        if not having:
            return
        bias, banned, allowed, last_of_words = (
            _Entries(self._vocab_start, self.local_vocab_size) for _ in range(4)
        )
        values, words = [np.empty(0, np.float32)], []
        for row, options in having.items():
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

    # ---- settings of rows, on the device -----------------------------------------------------

    def prompt_lengths(self, rows: Tensor) -> Tensor:
        """Tokens of each row's prompt: rows [n] -> [n] int64."""
        return self._settings[rows, _PROMPT_LENGTH].long()

    def truncations(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """top_k [n] int32, top_p [n] and min_p [n] float32 of `rows` [n]."""
        settings = self._settings[rows]
        # Each in memory of its own, which a column of one row is not, be it contiguous: kernels are
        # compiled for addresses that 16 divides.
        top_k, top_p, min_p = (settings[:, i].clone() for i in (_TOP_K, _TOP_P, _MIN_P))
        return top_k, top_p.view(torch.float32), min_p.view(torch.float32)

    def penalties(self, rows: Tensor) -> Tensor:
        """Repetition, frequency and presence penalty of `rows` [n]: [n, 3] float32."""
        return self._settings[rows, _PENALTIES:].contiguous().view(torch.float32)


class _Entries:
    """Collects (row, column) entries of one kind, those of this rank's slice alone."""

    def __init__(self, vocab_start: int, local_vocab_size: int) -> None:
        self._first, self._size = vocab_start, local_vocab_size
        self._rows: list[np.ndarray] = [np.empty(0, np.int64)]
        self._cols: list[np.ndarray] = [np.empty(0, np.int64)]

    def add(self, row: int, ids: np.ndarray) -> np.ndarray:
        """Add ids of a row; the indices of those that were kept."""
        cols = ids.astype(np.int64) - self._first
        kept = np.flatnonzero((cols >= 0) & (cols < self._size))
        self._rows.append(np.full(kept.size, row, dtype=np.int64))
        self._cols.append(cols[kept])
        return kept

    def upload(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, cols = np.concatenate(self._rows), np.concatenate(self._cols)
        return upload(rows, device), upload(cols, device)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on the device, without waiting for what the device is doing."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host.clone()
    # torch keeps a pinned buffer until the copies from it are done
    return host.pin_memory().to(device, non_blocking=True)
