"""How decode attention divides a batch's contexts among programs, planned on the host each step.

A program reads one part of a context, for one key/value head. A small batch is cut into as many
parts as a GPU runs at a time; of a large one the longest contexts are cut, so that nobody waits for
a single program: one context of 32,768 tokens among 184 of 860 took 1.44 ms a layer, and takes
0.19 in 21 parts. Contexts are known before a step and are the same in all of its layers. A plan has
a fixed size, so a CUDA graph can read it.

S sequences, K key/value heads of this rank, P parts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

SPLIT_WORDS = 8  # a sector of memory, of which one word is free
# Of a part: its sequence, and the length of that one's context; where the part begins and ends;
# which of how many parts of its sequence it is; and the scratch place of the first of these.
SEQ, CONTEXT_LEN, BEGIN, END, INDEX, COUNT, SCRATCH = range(7)

# Parts begin at multiples of the larger of the two tiles that a program reads at a time.
GRAIN = 64  # tokens
# The parts of a context are joined one after the other, some 0.3 us each.
_MIN_PART = 128  # tokens
_MAX_PARTS = 32
# Programs of the two shapes that run at a time on an H200, 3 and 5 on a multiprocessor.
_LARGE_PROGRAMS, _SMALL_PROGRAMS = 396, 660
# Parts of contexts in several, over all heads. A batch of fewer than run at a time may consist of
# nothing else; in a larger one a quarter of those are further parts, and as many again are firsts.
SCRATCH_PLACES = _LARGE_PROGRAMS


@dataclass(frozen=True)
class ContextSplit:
    """The division for a model's KV heads.

    Args:
        num_kv_heads: K
    """

    num_kv_heads: int

    def has_large_programs(self, num_seqs: int) -> bool:
        """Whether a batch has so few heads that each gets a large program.

        Many heads get small ones, which end more evenly.
        """
        return num_seqs * self.num_kv_heads <= 2 * _LARGE_PROGRAMS

    def num_splits(self, num_seqs: int) -> int:
        """P, the size of a plan for S sequences: no less than for fewer.

        In a large batch a quarter of what runs at a time is left for the parts of long contexts.
        """
        at_a_time = self._at_a_time(num_seqs)
        return max(at_a_time, num_seqs + at_a_time // 4) if num_seqs else 0

    def _at_a_time(self, num_seqs: int) -> int:
        programs = _LARGE_PROGRAMS if self.has_large_programs(num_seqs) else _SMALL_PROGRAMS
        return max(1, programs // self.num_kv_heads)

    def plan(self, context_lens: np.ndarray) -> np.ndarray:
        """The parts, the longest first: [P, SPLIT_WORDS] int32, zeros where there are fewer.

        Args:
            context_lens: [S], tokens that each sequence's query sees; 0 for none
        """
        S = context_lens.size
        plan = np.zeros((self.num_splits(S), SPLIT_WORDS), dtype=np.int32)
        lens = context_lens.astype(np.int64)
        longest = int(lens.max(initial=0))
        if longest == 0:
            return plan
        length = self._length(lens, longest)
        # as equal as can be inside a context
        each = _cdiv(lens, np.maximum(_cdiv(lens, length), 1))
        each = _cdiv(each, GRAIN) * GRAIN
        counts = _cdiv(lens, np.maximum(each, 1))
        firsts = np.cumsum(counts) - counts
        seqs = np.repeat(np.arange(S), counts)
        index = np.arange(seqs.size) - firsts[seqs]
        begins = index * each[seqs]
        ends = np.minimum(begins + each[seqs], lens[seqs])
        scratch = np.where(counts > 1, counts, 0)
        scratch = np.cumsum(scratch) - scratch
        words = (seqs, lens[seqs], begins, ends, index, counts[seqs], scratch[seqs])
        order = np.argsort(begins - ends, kind="stable")
        for word, values in enumerate(words):
            plan[: seqs.size, word] = values[order]
        return plan

    def _length(self, lens: np.ndarray, longest: int) -> int:
        """The shortest length of which there are no more than P parts.

        It is a multiple of GRAIN, and no shorter than _MIN_PART or the longest by _MAX_PARTS.
        """
        most = self.num_splits(int(np.count_nonzero(lens)))
        too_short = _cdiv(max(_MIN_PART, _cdiv(longest, _MAX_PARTS)), GRAIN) - 1
        enough = max(too_short + 1, _cdiv(longest, GRAIN))
        while enough - too_short > 1:
            middle = (enough + too_short) // 2
            if int(_cdiv(lens, middle * GRAIN).sum()) > most:
                too_short = middle
            else:
                enough = middle
        return int(enough * GRAIN)


class SplitSchedules:
    """The plans of one decode step after the other, which mostly go on from the last one.

    As long as each sequence has as many tokens as in the step before or one more, the parts stay,
    and the last of each sequence grows: a new division takes the host several times as long, up to
    0.1 ms. After GRAIN steps there is one all the same.
    """

    def __init__(self, split: ContextSplit) -> None:
        self._split = split
        self._lens: np.ndarray = np.empty(0, dtype=np.int32)
        self._plan = split.plan(self._lens)
        self._parts = self._plan  # those that are none of its zeros
        self._age = 0

    def next(self, context_lens: np.ndarray) -> np.ndarray:
        """A plan as `ContextSplit.plan` makes it, but for the order, and the length of last parts.

        Args:
            context_lens: [S], none of them 0

        Returns:
            [P, SPLIT_WORDS] int32, which the next call changes.
        """
        if self._goes_on(context_lens):
            parts = self._parts
            grown = (context_lens - self._lens)[parts[:, SEQ]]
            is_last = parts[:, END] == parts[:, CONTEXT_LEN]
            parts[:, CONTEXT_LEN] += grown
            parts[:, END] += grown * is_last
            self._age += 1
        else:
            assert context_lens.all()
            self._plan = self._split.plan(context_lens)
            self._parts = self._plan[: np.count_nonzero(self._plan[:, END])]
            self._age = 0
        self._lens = context_lens.copy()
        return self._plan

    def _goes_on(self, context_lens: np.ndarray) -> bool:
        if context_lens.size != self._lens.size or self._age == GRAIN:
            return False
        # all differences are 0 or 1: no other bit is set
        return not ((context_lens - self._lens) & ~1).any()


def _cdiv(a: Any, b: Any) -> Any:
    """a / b, rounded up: numbers, or arrays of them."""
    return -(-a // b)
