"""The split schedule of decode attention: how the host divides contexts among programs each step.

A program reads one KV split, an interval of one context, for one key/value head. The contexts of a
small batch are divided into as many splits as a GPU runs at a time. In a large batch the longest
contexts are divided, so that no step waits for a single program: one context of 32,768 tokens among
184 of 860 took 1.44 ms a layer undivided. Context lengths are known before a step and equal in all
of its layers. A schedule has a fixed size, so that a CUDA graph can read it.

S sequences, K key/value heads of this rank, P KV splits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

SPLIT_WORDS = 8  # one 32-byte sector of memory; the last word is unused
# The words of a split: its sequence, the length of that sequence's context, the split's first token
# and end, its index among the sequence's splits, their count, and the scratch entry of the first.
SEQ, CONTEXT_LEN, BEGIN, END, INDEX, COUNT, SCRATCH = range(7)

# Splits begin at multiples of the larger of the kernel's two tile sizes.
SPLIT_GRANULARITY = 64  # tokens
# Combining the splits of a context takes about 0.3 us for each.
_MIN_SPLIT_TOKENS = 128  # tokens
_MAX_SPLITS = 32
# Concurrent programs of the two shapes on an H200: 3 and 5 on a multiprocessor.
_LARGE_PROGRAMS, _SMALL_PROGRAMS = 396, 660
# Upper bound of the splits, over all heads, of contexts with several splits. In a small batch these
# are at most the concurrent programs. In a larger batch a quarter of those are additional splits,
# and at most as many again are the first splits of their contexts.
NUM_SCRATCH_ENTRIES = _LARGE_PROGRAMS


@dataclass(frozen=True)
class ContextSplit:
    """Divides the contexts of a batch into KV splits.

    Args:
        num_kv_heads: K
    """

    num_kv_heads: int

    def has_large_programs(self, num_seqs: int) -> bool:
        """Whether a batch has so few heads that each program takes the large tile.

        With many heads, small programs finish more evenly.
        """
        return num_seqs * self.num_kv_heads <= 2 * _LARGE_PROGRAMS

    def num_splits(self, num_seqs: int) -> int:
        """Return P, the size of a schedule for S sequences. It never decreases with S.

        In a large batch a quarter of the concurrent programs is left for splits of long contexts.
        """
        num_concurrent = self._num_concurrent(num_seqs)
        return max(num_concurrent, num_seqs + num_concurrent // 4) if num_seqs else 0

    def _num_concurrent(self, num_seqs: int) -> int:
        programs = _LARGE_PROGRAMS if self.has_large_programs(num_seqs) else _SMALL_PROGRAMS
        return max(1, programs // self.num_kv_heads)

    def schedule(self, context_lens: np.ndarray) -> np.ndarray:
        """Divide contexts into KV splits, the longest split first.

        Args:
            context_lens: [S], tokens that each sequence's query sees; 0 for none

        Returns:
            [P, SPLIT_WORDS] int32; unused rows are 0.
        """
        S = context_lens.size
        schedule = np.zeros((self.num_splits(S), SPLIT_WORDS), dtype=np.int32)
        lens = context_lens.astype(np.int64)
        longest = int(lens.max(initial=0))
        if longest == 0:
            return schedule
        length = self._split_length(lens, longest)
        # the splits of one context are as equal as possible
        split_lens = _cdiv(lens, np.maximum(_cdiv(lens, length), 1))
        split_lens = _cdiv(split_lens, SPLIT_GRANULARITY) * SPLIT_GRANULARITY
        counts = _cdiv(lens, np.maximum(split_lens, 1))
        first_splits = np.cumsum(counts) - counts
        seqs = np.repeat(np.arange(S), counts)
        index = np.arange(seqs.size) - first_splits[seqs]
        begins = index * split_lens[seqs]
        ends = np.minimum(begins + split_lens[seqs], lens[seqs])
        scratch = np.where(counts > 1, counts, 0)
        scratch = np.cumsum(scratch) - scratch
        columns = (seqs, lens[seqs], begins, ends, index, counts[seqs], scratch[seqs])
        order = np.argsort(begins - ends, kind="stable")
        for column, values in enumerate(columns):
            schedule[: seqs.size, column] = values[order]
        return schedule

    def _split_length(self, lens: np.ndarray, longest: int) -> int:
        """Return the shortest split length that gives at most P splits.

        It is a multiple of SPLIT_GRANULARITY, at least _MIN_SPLIT_TOKENS, and at least the longest
        context divided by _MAX_SPLITS.
        """
        max_splits = self.num_splits(int(np.count_nonzero(lens)))
        too_short = (
            _cdiv(max(_MIN_SPLIT_TOKENS, _cdiv(longest, _MAX_SPLITS)), SPLIT_GRANULARITY) - 1
        )
        enough = max(too_short + 1, _cdiv(longest, SPLIT_GRANULARITY))
        while enough - too_short > 1:
            middle = (enough + too_short) // 2
            if int(_cdiv(lens, middle * SPLIT_GRANULARITY).sum()) > max_splits:
                too_short = middle
            else:
                enough = middle
        return int(enough * SPLIT_GRANULARITY)


class SplitSchedules:
    """Makes the schedules of consecutive decode steps, extending the last one where it can.

    While each sequence has as many tokens as in the step before or one more, the splits stay, and
    the last split of each sequence grows. A new division takes the host several times as long, up
    to 0.1 ms; it is made at the latest after SPLIT_GRANULARITY steps.
    """

    def __init__(self, split: ContextSplit) -> None:
        self._split = split
        self._lens: np.ndarray = np.empty(0, dtype=np.int32)
        self._schedule = split.schedule(self._lens)
        self._splits = self._schedule  # without its unused rows
        self._num_extensions = 0

    def next(self, context_lens: np.ndarray) -> np.ndarray:
        """Return a schedule for this step.

        It differs from that of `ContextSplit.schedule` only in the order of the splits and in the
        length of each sequence's last split.

        Args:
            context_lens: [S], none of them 0

        Returns:
            [P, SPLIT_WORDS] int32, which the next call changes.
        """
        if self._can_extend(context_lens):
            splits = self._splits
            grown = (context_lens - self._lens)[splits[:, SEQ]]
            is_last = splits[:, END] == splits[:, CONTEXT_LEN]
            splits[:, CONTEXT_LEN] += grown
            splits[:, END] += grown * is_last
            self._num_extensions += 1
        else:
            assert context_lens.all()
            self._schedule = self._split.schedule(context_lens)
            self._splits = self._schedule[: np.count_nonzero(self._schedule[:, END])]
            self._num_extensions = 0
        self._lens = context_lens.copy()
        return self._schedule

    def _can_extend(self, context_lens: np.ndarray) -> bool:
        if context_lens.size != self._lens.size or self._num_extensions == SPLIT_GRANULARITY:
            return False
        # all differences are 0 or 1: no other bit is set
        return not ((context_lens - self._lens) & ~1).any()


def _cdiv(a: Any, b: Any) -> Any:
    """Return a / b, rounded up, for numbers or arrays."""
    return -(-a // b)
