"""Decides what every step computes: continuous batching, chunked prefill, preemption.

Each step is planned while the one before it still runs on the GPUs, so the scheduler works on two
counts of a sequence: the tokens it knows, and those asked for and still in flight. A decode row
may thus be scheduled whose input token nobody on this side has seen yet. What turns out one step
late (an end token) is undone one step late: the extra token is dropped on arrival.

Order within a step: a token for every decoding sequence, then chunks of prompts that have begun,
then new prompts in order of arrival, up to `max_num_batched_tokens`. When blocks run out the latest
arrival is preempted: it gives its blocks back (they stay findable in the prefix cache), waits
first in line, and is computed again later. Batching at the level of steps follows Orca (OSDI 2022),
chunks mixed with decodes follow Sarathi-Serve (https://arxiv.org/abs/2403.02310).
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tpllm.channel.step_plan import PlanLimits, StepMasks, StepPlan, StepResult
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.grammars import fill_masks
from tpllm.engine.logprob_results import take_logprobs
from tpllm.engine.request import RequestUpdate, Sequence, Status, TokenLogprobs
from tpllm.engine.step_builder import StepBuilder


@dataclass
class SchedulerStats:
    """Running totals since the engine started."""

    num_steps: int = 0
    num_prefill_chunks: int = 0  # chunks that ended before their prompt did
    num_mixed_steps: int = 0  # steps with both decode rows and prefill rows
    num_preemptions: int = 0
    num_prompt_tokens: int = 0  # of admitted requests, each counted once
    num_cached_tokens: int = 0  # of these, found in the prefix cache
    num_generated_tokens: int = 0


class Scheduler:
    """Owns the sequences, their blocks and their rows.

    `add`, `abort`, `schedule`, `take_masks` and `finish` are all there is: the caller broadcasts
    what `schedule` and, after it and after each `finish`, `take_masks` return, and hands what comes
    back to `finish`, in the same order.
    """

    def __init__(self, blocks: BlockManager, limits: PlanLimits) -> None:
        self.stats = SchedulerStats()
        self._blocks = blocks
        self._limits = limits
        # both in order of arrival; dicts, so that any one can leave at no cost to the others
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._running: dict[Sequence, None] = {}
        self._by_id: dict[str, Sequence] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        # finished or preempted, with blocks that a step in flight still writes
        self._leaving: dict[Sequence, int] = {}  # -> blocks that will be free then
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()
        # of the newest step, the rows that wait for masks: index in the plan, sequence
        self._owed: list[tuple[int, Sequence]] = []
        self._step = 0

    # ---- requests ----------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        self._by_id[seq.request_id] = seq
        self._waiting[seq] = None

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """End requests now; ids that are unknown or already finished are passed over."""
        updates = []
        for request_id in request_ids:
            seq = self._by_id.get(request_id)
            if seq is not None:
                self._end(seq)
                num_cached_tokens = max(0, seq.num_cached_tokens)
                updates.append(RequestUpdate(request_id, [], "abort", None, num_cached_tokens))
        return updates

    @property
    def num_unfinished(self) -> int:
        return len(self._by_id)

    @property
    def num_waiting(self) -> int:
        """Requests without a row: new ones, and preempted ones."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled whose results have not come back."""
        return len(self._in_flight)

    # ---- planning ----------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None where nothing can be computed before a result comes back."""
        if self._owed:
            return None  # masks come before any later step
        step = StepBuilder(self._limits)
        begun: list[Sequence] = []  # running, and still inside their prompts
        may_admit = self._schedule_decodes(step, begun)
        for seq in begun:
            if step.budget > 0:
                self._add_chunk(step, seq)
        if may_admit:
            self._admit(step)
        if not step.decode and not step.prefill:
            return None
        plan, seqs = step.seal(self._step)
        self._in_flight.append((self._step, seqs))
        self._step += 1
        self._owed = [
            (i, seq)
            for i, seq in enumerate(seqs)
            if seq.grammar is not None and seq.num_computed_tokens >= seq.prefill_target
        ]
        self.stats.num_steps += 1
        self.stats.num_mixed_steps += bool(step.decode and step.prefill)
        return plan

    def _schedule_decodes(self, step: StepBuilder, begun: list[Sequence]) -> bool:
        """Add a token of every decoding sequence; False where blocks ran short for one.

        Sequences that do not decode yet are added to `begun`.
        """
        block_size = self._blocks.block_size
        num_stalled = 0
        may_admit = True
        for seq in list(self._running):
            if step.budget == 0:
                break
            if seq.status is not Status.RUNNING:
                break  # preempted for an earlier one, and with it all that come after
            position = seq.num_computed_tokens
            if position < seq.prefill_target:
                begun.append(seq)
                continue
            if position + 1 >= seq.max_total_tokens:
                continue  # every token that it may have is known or on its way
            if position // block_size == len(seq.block_table):
                if not self._make_room(seq, num_stalled):
                    num_stalled += seq.status is Status.RUNNING
                    may_admit = False
                    continue
                step.add_block(seq, self._blocks.allocate())
            step.decode.append(seq)
            step.budget -= 1
        return may_admit

    def _make_room(self, seq: Sequence, num_stalled: int) -> bool:
        """Free a block for `seq`, preempting later arrivals; False where it must sit this step out.

        Blocks that a step in flight still writes come back with its result. Where enough of them
        are on their way for all that wait, nobody else is preempted.
        """
        while self._blocks.num_free == 0:
            if sum(self._leaving.values()) > num_stalled:
                return False
            victim = next(reversed(self._running))
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _admit(self, step: StepBuilder) -> None:
        """Let new sequences in, in order of arrival, while rows, blocks and budget last."""
        limits = self._limits
        while self._waiting and self._free_rows and step.budget > 0:
            seq = next(iter(self._waiting))
            if seq.num_steps_in_flight:
                return  # preempted with a token on its way: it is kept, so wait for it
            num_blocks = -(-len(seq.tokens) // limits.block_size)
            digests = self._blocks.digest_chain(seq.tokens, seq.block_digests)
            # the last token is always computed: its logits are what the step is for
            num_matched = (len(seq.tokens) - 1) // limits.block_size
            if seq.prompt_logprobs is not None:
                num_matched = 0  # the hidden states of its prompt are not cached
            cached = self._blocks.match_prefix(digests[:num_matched])
            num_new = num_blocks - len(cached)
            if not (self._blocks.can_take(cached, num_new) and step.has_room(seq, num_blocks)):
                return
            del self._waiting[seq]
            seq.status = Status.RUNNING
            seq.row = self._free_rows.pop()
            seq.block_table = self._blocks.take(cached, num_new)
            seq.num_computed_tokens = len(cached) * limits.block_size
            seq.num_registered_blocks = len(cached)
            seq.prefill_target = len(seq.tokens)
            if seq.num_cached_tokens < 0:
                seq.num_cached_tokens = seq.num_computed_tokens
                self.stats.num_prompt_tokens += seq.num_prompt_tokens
                self.stats.num_cached_tokens += seq.num_computed_tokens
            self._running[seq] = None
            step.enter(seq)
            self._add_chunk(step, seq)

    def _add_chunk(self, step: StepBuilder, seq: Sequence) -> None:
        num_left = seq.prefill_target - seq.num_computed_tokens
        num_tokens = min(num_left, step.budget)
        self.stats.num_prefill_chunks += num_tokens < num_left
        step.budget -= num_tokens
        step.prefill.append((seq, num_tokens))
        # Registered before it is computed: whoever shares these blocks comes later, in this step or
        # after it, and a row attends when the keys and values of all rows before it are stored.
        self._register_blocks(seq, seq.num_computed_tokens + num_tokens)

    def take_masks(self) -> StepMasks | None:
        """The masks of the newest step, once all tokens that they follow are known.

        None before that, after they have been taken, and where no row waits for one. The workers
        compute the step meanwhile.
        """
        # what has ended since draws a token that nobody wants
        waiting = [(i, seq) for i, seq in self._owed if seq.status is not Status.FINISHED]
        if not self._owed or any(len(s.tokens) < s.num_computed_tokens for _, s in waiting):
            return None
        self._owed = []
        matchers = [seq.follow_grammar() for _, seq in waiting]
        held_back = [seq.held_back() for _, seq in waiting]
        words = fill_masks(matchers, held_back, self._limits.mask_words)
        kept = [j for j, matcher in enumerate(matchers) if matcher.failure is None]
        indices = np.array([waiting[j][0] for j in kept], dtype=np.int32)
        return StepMasks(self._step - 1, indices, words[kept].view(np.int32))

    # ---- results -----------------------------------------------------------------------------

    def finish(self, result: StepResult) -> list[RequestUpdate]:
        """Take the result of the oldest step in flight: new tokens, ends, blocks that come back."""
        step, seqs = self._in_flight.popleft()
        assert result.step == step, f"result of step {result.step}, expected step {step}"
        updates = []
        token_ids = iter(result.token_ids.tolist())
        new_logprobs = take_logprobs(seqs, result.logprobs)
        for i, (seq, num_yielded) in enumerate(zip(seqs, result.num_yielded.tolist(), strict=True)):
            seq.num_steps_in_flight -= 1
            for token_id in islice(token_ids, num_yielded):
                if seq.status is not Status.FINISHED:  # else it came too late, and is dropped
                    logprobs = new_logprobs.get(i) if new_logprobs else None
                    updates.append(self._append(seq, token_id, logprobs))
            if seq.num_steps_in_flight == 0 and seq in self._leaving:
                self._release(seq)
        return updates

    def _append(
        self, seq: Sequence, token_id: int, logprobs: list[TokenLogprobs] | None
    ) -> RequestUpdate:
        # for every token of every step: what most sequences do not ask for costs one look each
        if seq.matcher is not None or seq.rules is not None:
            reason = seq.dead_end(token_id)
            if reason is not None:
                return self._give_up(seq, reason)
        may_end = token_id in seq.end_token_ids
        self.stats.num_generated_tokens += 1
        seq.tokens.append(token_id)
        num_tokens = len(seq.tokens)
        if num_tokens >= (seq.num_registered_blocks + 1) * self._blocks.block_size:
            self._register_blocks(seq, seq.num_computed_tokens)
        finish_reason = stop_reason = None
        if may_end and seq.ends_at_end_token():
            finish_reason = "stop"
            stop_reason = token_id if token_id in seq.stop_token_ids else None
        elif num_tokens >= seq.max_total_tokens:
            finish_reason = "length"
        if finish_reason:
            self._end(seq)
        return RequestUpdate(
            seq.request_id,
            [token_id],
            finish_reason,
            stop_reason,
            seq.num_cached_tokens,
            logprobs,
            None if seq.prompt_logprobs is None else seq.take_prompt_logprobs(),
        )

    def _give_up(self, seq: Sequence, reason: str) -> RequestUpdate:
        """End a sequence that has no next token, without the one that it has drawn."""
        self._end(seq)
        return RequestUpdate(seq.request_id, [], "error", reason, seq.num_cached_tokens)

    def _register_blocks(self, seq: Sequence, num_stored: int) -> None:
        """Make the full blocks among the first `num_stored` tokens findable."""
        num_full = min(num_stored, len(seq.tokens)) // self._blocks.block_size
        if num_full <= seq.num_registered_blocks or seq.row < 0:
            return
        digests = self._blocks.digest_chain(seq.tokens, seq.block_digests)
        for i in range(seq.num_registered_blocks, min(num_full, len(digests))):
            self._blocks.register(seq.block_table[i], digests[i])
        seq.num_registered_blocks = num_full

    # ---- leaving -----------------------------------------------------------------------------

    def _end(self, seq: Sequence) -> None:
        """The sequence is finished or aborted: no later result concerns it."""
        del self._by_id[seq.request_id]
        if seq.status is Status.RUNNING:
            del self._running[seq]
            self._leave(seq)
        else:
            del self._waiting[seq]
        seq.status = Status.FINISHED

    def _preempt(self, seq: Sequence) -> None:
        """Send the latest arrival back to the head of the queue; its known tokens are kept."""
        del self._running[seq]
        self._waiting[seq] = None
        self._waiting.move_to_end(seq, last=False)
        seq.status = Status.WAITING
        self.stats.num_preemptions += 1
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        """Give row and blocks back, as soon as no step in flight writes them."""
        if seq.num_steps_in_flight == 0:
            self._release(seq)
        else:
            self._leaving[seq] = self._blocks.num_freed_by(seq.block_table)

    def _release(self, seq: Sequence) -> None:
        self._leaving.pop(seq, None)
        self._blocks.release(seq.block_table)
        self._free_rows.append(seq.row)
        seq.reset()
