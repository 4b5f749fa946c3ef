"""Collects the scheduler's decisions for a step within the plan's limits, and builds the plan."""

import numpy as np

from tpllm.channel.row_record import new_records
from tpllm.channel.step_plan import PlanLimits, StepPlan
from tpllm.engine.request import Sequence


class StepBuilder:
    """One step under construction; `build` returns its plan.

    Attributes:
        budget: number of tokens that the step can still take
        decode: sequences of the decode rows
        prefill: sequences with a prefill chunk, and the number of tokens in it
    """

    def __init__(self, limits: PlanLimits) -> None:
        self.budget = limits.max_num_batched_tokens
        self.decode: list[Sequence] = []
        self.prefill: list[tuple[Sequence, int]] = []
        self._limits = limits
        self._entering: list[Sequence] = []
        self._block_updates: list[int] = []  # flat (table position, block) pairs
        self._num_list_words = 0

    def add_block(self, seq: Sequence, block: int) -> None:
        """Add a block to the table of a decoding sequence."""
        position = seq.row * self._limits.max_blocks_per_seq + len(seq.block_table)
        seq.block_table.append(block)
        self._block_updates += (position, block)

    def has_room(self, seq: Sequence, num_blocks: int) -> bool:
        """Whether the plan has room for one more entering sequence with `num_blocks` blocks."""
        limits = self._limits
        if len(self._block_updates) // 2 + num_blocks > limits.max_block_updates:
            return False
        return self._num_list_words + _num_list_words(seq) <= limits.max_row_list_words

    def add_entering(self, seq: Sequence) -> None:
        """Add a sequence that has just got its row and its blocks."""
        self._entering.append(seq)
        self._num_list_words += _num_list_words(seq)
        first = seq.row * self._limits.max_blocks_per_seq
        for index, block in enumerate(seq.block_table):
            self._block_updates += (first + index, block)

    def build(self, number: int) -> tuple[StepPlan, list[Sequence]]:
        """Return the plan of step `number` and its sequences, whose counts include the step."""
        seqs = self.decode + [seq for seq, _ in self.prefill]
        lengths = [1] * len(self.decode) + [num_tokens for _, num_tokens in self.prefill]
        starts = [seq.num_computed_tokens for seq in seqs]
        token_ids: list[int] = []
        for seq, num_tokens in self.prefill:
            token_ids += seq.tokens[seq.num_computed_tokens : seq.num_computed_tokens + num_tokens]
        samples = []
        for seq, num_tokens in zip(seqs, lengths, strict=True):
            seq.num_computed_tokens += num_tokens
            seq.num_steps_in_flight += 1
            samples.append(seq.num_computed_tokens >= seq.prefill_target)
        entering, row_lists = _records_of(self._entering)
        plan = StepPlan(
            step=number,
            num_decode=len(self.decode),
            rows=np.array([seq.row for seq in seqs], dtype=np.int32),
            starts=np.array(starts, dtype=np.int32),
            num_tokens=np.array(lengths, dtype=np.int32),
            samples=np.array(samples, dtype=np.int32),
            entering=entering,
            block_updates=np.array(self._block_updates, dtype=np.int32).reshape(-1, 2),
            token_ids=np.array(token_ids, dtype=np.int32),
            row_lists=row_lists,
        )
        return plan, seqs


def _records_of(seqs: list[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Return the records of entering sequences [n], and their lists joined [m] int32."""
    records = new_records(len(seqs))
    records["row"] = [seq.row for seq in seqs]
    for name in seqs[0].row_fields if seqs else ():
        records[name] = [seq.row_fields[name] for seq in seqs]
    lists = [np.empty(0, dtype=np.int32)]
    for i, seq in enumerate(seqs):
        lists += [each.view(np.int32) for each in seq.lists.values()]
        if seq.reads_tokens:
            records["list_sizes"][i, -1] = len(seq.tokens)
            lists.append(np.array(seq.tokens, dtype=np.int32))
    return records, np.concatenate(lists)


def _num_list_words(seq: Sequence) -> int:
    return sum(map(len, seq.lists.values())) + (len(seq.tokens) if seq.reads_tokens else 0)
