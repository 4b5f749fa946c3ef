"""Sampling settings of a row beyond temperature and seed, as a plan carries them.

Most rows have only a temperature and a seed, and no record here. A record is a header of int32
words followed by its lists. A step's plan joins the records of all rows that enter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# row, words of the record, tokens of the prompt, top_k, five float32 values, num_logprobs,
# num_prompt_logprobs, is_masked, then the lengths of seven lists
_HEADER_WORDS = 19
_NO_IDS = np.empty(0, dtype=np.int32)
_NO_VALUES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class RowOptions:
    """Settings of one row. The defaults change nothing.

    Attributes:
        num_prompt_tokens: tokens of the row that were not generated
        top_k: most tokens to sample from; 0 for all
        bias_ids, bias_values: int32 and float32; each value is added to the logit of its id
        banned_ids: int32, ids that are not sampled before the row's minimum position
        allowed_ids: int32, the only ids that are sampled; empty for all
        bad_word_ids, bad_word_ends: int32, the token ids of all bad words joined, and the index at
            which each word ends
        num_logprobs, num_prompt_logprobs: how many likeliest tokens to report besides the actual
            one; -1 for no report
        is_masked: whether sampling waits for a mask of the allowed tokens: see `StepMasks`
    """

    num_prompt_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    num_logprobs: int = -1
    num_prompt_logprobs: int = -1
    is_masked: bool = False
    bias_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    bias_values: np.ndarray = field(default_factory=lambda: _NO_VALUES)
    banned_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    allowed_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    bad_word_ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    bad_word_ends: np.ndarray = field(default_factory=lambda: _NO_IDS)

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)

    @property
    def truncates(self) -> bool:
        """Whether only some of the likeliest tokens can be sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def has_lists(self) -> bool:
        return any(each.size for each in self._lists())

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits change before a token is sampled from them."""
        return self.truncates or self.has_penalties or self.has_lists

    @property
    def reads_tokens(self) -> bool:
        """Whether the worker needs the row's tokens."""
        return bool(self.has_penalties or self.bad_word_ids.size or self.num_prompt_logprobs >= 0)

    @property
    def list_words(self) -> int:
        """The number of words that the lists take in a record."""
        return sum(each.size for each in self._lists())

    def _lists(self) -> tuple[np.ndarray, ...]:
        return (
            self.bias_ids,
            self.bias_values,
            self.banned_ids,
            self.allowed_ids,
            self.bad_word_ids,
            self.bad_word_ends,
        )

    def record(self, row: int, tokens: list[int]) -> np.ndarray:
        """Return the record for the workers: [words] int32.

        Args:
            row: the row that the sequence enters.
            tokens: the sequence's tokens so far; the record leaves them out if nothing reads them.
        """
        known = np.array(tokens if self.reads_tokens else [], dtype=np.int32)
        lists = [*(each.view(np.int32) for each in self._lists()), known]
        floats = np.array(
            [
                self.top_p,
                self.min_p,
                self.repetition_penalty,
                self.frequency_penalty,
                self.presence_penalty,
            ],
            dtype=np.float32,
        ).view(np.int32)
        header = [
            row,
            record_words(self, known.size),
            self.num_prompt_tokens,
            self.top_k,
            *floats.tolist(),
            self.num_logprobs,
            self.num_prompt_logprobs,
            int(self.is_masked),
            *(each.size for each in lists),
        ]
        return np.concatenate([np.array(header, dtype=np.int32), *lists])


class EnteringOptions(NamedTuple):
    """A record as a worker reads it."""

    row: int
    options: RowOptions
    tokens: np.ndarray  # [n] int32, the sequence's tokens so far; empty if nothing reads them


def record_words(options: RowOptions, num_tokens: int) -> int:
    """Return the number of words of a record for a sequence of `num_tokens` tokens."""
    return _HEADER_WORDS + options.list_words + (num_tokens if options.reads_tokens else 0)


def read_records(words: np.ndarray) -> Iterator[EnteringOptions]:
    """Yield the records of a plan's `row_options` [words] int32; their lists are views of it."""
    while words.size:
        row, size, num_prompt_tokens, top_k = words[:4].tolist()
        top_p, min_p, repetition, frequency, presence = words[4:9].view(np.float32).tolist()
        num_logprobs, num_prompt_logprobs, is_masked, *sizes = words[9:_HEADER_WORDS].tolist()
        bounds = np.cumsum([_HEADER_WORDS, *sizes]).tolist()
        lists = [words[begin:end] for begin, end in pairwise(bounds)]
        options = RowOptions(
            num_prompt_tokens=num_prompt_tokens,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            is_masked=bool(is_masked),
            bias_ids=lists[0],
            bias_values=lists[1].view(np.float32),
            banned_ids=lists[2],
            allowed_ids=lists[3],
            bad_word_ids=lists[4],
            bad_word_ends=lists[5],
        )
        yield EnteringOptions(row, options, lists[6])
        words = words[size:]
