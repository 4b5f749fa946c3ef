"""Collects the scheduler's decisions for a step within the plan's limits, and builds the plan."""

import numpy as np

from tpllm.channel.row_options import record_words
from tpllm.channel.step_plan import ENTERING_WORDS, MAX_MASKED_STOP_IDS, PlanLimits, StepPlan
from tpllm.engine.request import Sequence

_NO_WORDS = np.empty(0, dtype=np.int32)


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
        self._num_option_words = 0

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
        return self._num_option_words + _num_option_words(seq) <= limits.max_option_words

    def add_entering(self, seq: Sequence) -> None:
        """Add a sequence that has just got its row and its blocks."""
        self._entering.append(seq)
        self._num_option_words += _num_option_words(seq)
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
        records = [
            seq.options.record(seq.row, seq.tokens)
            for seq in self._entering
            if seq.options is not None
        ]
        entering = np.array([_entering_words(seq) for seq in self._entering], dtype=np.int32)
        plan = StepPlan(
            step=number,
            num_decode=len(self.decode),
            rows=np.array([seq.row for seq in seqs], dtype=np.int32),
            starts=np.array(starts, dtype=np.int32),
            num_tokens=np.array(lengths, dtype=np.int32),
            samples=np.array(samples, dtype=np.int32),
            entering=entering.reshape(-1, ENTERING_WORDS),
            block_updates=np.array(self._block_updates, dtype=np.int32).reshape(-1, 2),
            token_ids=np.array(token_ids, dtype=np.int32),
            row_options=np.concatenate(records) if records else _NO_WORDS,
        )
        return plan, seqs


def _entering_words(seq: Sequence) -> list[int]:
    masked = sorted(seq.end_token_ids) if seq.min_total_tokens > seq.num_prompt_tokens else []
    if len(masked) > MAX_MASKED_STOP_IDS or seq.grammar is not None:
        masked = []  # the row's options or its masks exclude them instead
    padding = [-1] * (MAX_MASKED_STOP_IDS - len(masked))
    temperature = int(np.float32(seq.temperature).view(np.int32))
    seed_low, seed_high = np.array([seq.seed], dtype="<u8").view("<i4").tolist()
    return [
        seq.row,
        temperature,
        seed_low,
        seed_high,
        seq.min_total_tokens,
        *masked,
        *padding,
    ]


def _num_option_words(seq: Sequence) -> int:
    return 0 if seq.options is None else record_words(seq.options, len(seq.tokens))
