"""Decides what every step computes: continuous batching, chunked prefill, preemption.

The scheduler plans a step while the step before it still runs on the GPUs. It therefore tracks two
counts of a sequence: the tokens that it knows, and the tokens that steps in flight compute. It may
schedule a decode row whose input token only the GPUs know. An end token is known one step late: the
token that was computed after it is dropped.

A step takes the decode rows first, then prefill chunks of running sequences, then new prompts in
order of arrival, up to `max_num_batched_tokens` tokens. When no block is free, the latest arrival
is preempted: it releases its blocks (which stay in the prefix cache), waits at the head of the
queue, and is computed again later. Batching at the level of steps follows Orca (OSDI 2022), mixed
steps follow Sarathi-Serve (https://arxiv.org/abs/2403.02310).
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from tpllm.channel.logprob_records import read_blocks
from tpllm.channel.step_plan import PlanLimits, StepMasks, StepPlan, StepResult
from tpllm.engine.block_manager import BlockManager
from tpllm.engine.grammars import fill_masks
from tpllm.engine.request import PackedLogprobs, RequestUpdate, Sequence, Status, TokenLogprobs
from tpllm.engine.step_builder import StepBuilder


@dataclass
class SchedulerStats:
    """Running totals since the engine started."""

    num_steps: int = 0
    num_prefill_chunks: int = 0  # prefill chunks that do not reach the end of their prompt
    num_mixed_steps: int = 0  # steps with both decode rows and prefill chunks
    num_preemptions: int = 0
    num_prompt_tokens: int = 0  # prompt tokens of admitted requests, each counted once
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_generated_tokens: int = 0


class Scheduler:
    """Owns the sequences, their blocks and their rows.

    The caller broadcasts the plan that `schedule` returns. After each `schedule` and each `finish`
    it broadcasts the masks that `take_masks` returns. It passes the results to `finish` in the
    order of their steps.
    """

    def __init__(self, blocks: BlockManager, limits: PlanLimits) -> None:
        self.stats = SchedulerStats()
        self._blocks = blocks
        self._limits = limits
        # both in order of arrival; dicts, so that any sequence can be removed in constant time
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._running: dict[Sequence, None] = {}
        self._by_id: dict[str, Sequence] = {}
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        # finished or preempted sequences whose blocks a step in flight still writes to, and the
        # number of blocks that become free after it
        self._releasing: dict[Sequence, int] = {}
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()
        # rows of the newest step that wait for masks: index in the plan, sequence
        self._awaiting_masks: list[tuple[int, Sequence]] = []
        self._step = 0

    # ---- requests ----------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        self._by_id[seq.request_id] = seq
        self._waiting[seq] = None

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """End requests now. Ids that are unknown or already finished are ignored."""
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
        """Plan the next step; return None if nothing can be computed before the next result."""
        if self._awaiting_masks:
            return None  # the masks of a step are sent before any later step
        step = StepBuilder(self._limits)
        prefilling: list[Sequence] = []  # running sequences that are still in their prompts
        may_admit = self._schedule_decodes(step, prefilling)
        for seq in prefilling:
            if step.budget > 0:
                self._add_chunk(step, seq)
        if may_admit:
            self._admit(step)
        if not step.decode and not step.prefill:
            return None
        plan, seqs = step.build(self._step)
        self._in_flight.append((self._step, seqs))
        self._step += 1
        self._awaiting_masks = [
            (i, seq)
            for i, seq in enumerate(seqs)
            if seq.grammar is not None and seq.num_computed_tokens >= seq.prefill_target
        ]
        self.stats.num_steps += 1
        self.stats.num_mixed_steps += bool(step.decode and step.prefill)
        return plan

    def _schedule_decodes(self, step: StepBuilder, prefilling: list[Sequence]) -> bool:
        """Add a decode row for every decoding sequence; return False if a block was missing.

        Running sequences that do not decode yet are appended to `prefilling`.
        """
        block_size = self._blocks.block_size
        num_stalled = 0
        may_admit = True
        for seq in list(self._running):
            if step.budget == 0:
                break
            if seq.status is not Status.RUNNING:
                break  # preempted for an earlier sequence, and so are all later ones
            position = seq.num_computed_tokens
            if position < seq.prefill_target:
                prefilling.append(seq)
                continue
            if position + 1 >= seq.max_total_tokens:
                continue  # its last token is known or in flight
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
        """Free a block for `seq` by preempting later arrivals; return False if `seq` must wait.

        Blocks that a step in flight still writes to become free with its result. If these are
        enough for all stalled sequences, no sequence is preempted.
        """
        while self._blocks.num_free == 0:
            if sum(self._releasing.values()) > num_stalled:
                return False
            victim = next(reversed(self._running))
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _admit(self, step: StepBuilder) -> None:
        """Admit new sequences in order of arrival, while rows, blocks and budget last."""
        limits = self._limits
        while self._waiting and self._free_rows and step.budget > 0:
            seq = next(iter(self._waiting))
            if seq.num_steps_in_flight:
                return  # preempted with a token in flight, which is kept: wait for it
            num_blocks = -(-len(seq.tokens) // limits.block_size)
            digests = self._blocks.digest_chain(seq.tokens, seq.block_digests)
            # the last token is always computed: the step needs its logits
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
            step.add_entering(seq)
            self._add_chunk(step, seq)

    def _add_chunk(self, step: StepBuilder, seq: Sequence) -> None:
        num_left = seq.prefill_target - seq.num_computed_tokens
        num_tokens = min(num_left, step.budget)
        self.stats.num_prefill_chunks += num_tokens < num_left
        step.budget -= num_tokens
        step.prefill.append((seq, num_tokens))
        # Blocks are registered before they are computed: a sequence that shares them comes later in
        # this step or after it, and attention runs after the keys and values of the step are stored
        self._register_blocks(seq, seq.num_computed_tokens + num_tokens)

    def take_masks(self) -> StepMasks | None:
        """Return the masks of the newest step, once the tokens before them are known.

        Return None before that, if they have been taken, and if no row waits for a mask. The
        workers compute the step's forward meanwhile.
        """
        # a request that has ended meanwhile needs no mask: its token is dropped
        waiting = [(i, s) for i, s in self._awaiting_masks if s.status is not Status.FINISHED]
        if not self._awaiting_masks or any(
            len(seq.tokens) < seq.num_computed_tokens for _, seq in waiting
        ):
            return None
        self._awaiting_masks = []
        matchers = [seq.get_matcher() for _, seq in waiting]
        held_back = [seq.held_back_ids() for _, seq in waiting]
        words = fill_masks(matchers, held_back, self._limits.mask_words)
        kept = [j for j, matcher in enumerate(matchers) if matcher.failure is None]
        indices = np.array([waiting[j][0] for j in kept], dtype=np.int32)
        return StepMasks(self._step - 1, indices, words[kept].view(np.int32))

    # ---- results -----------------------------------------------------------------------------

    def finish(self, result: StepResult) -> list[RequestUpdate]:
        """Process the result of the oldest step in flight and return an update per new token."""
        step, seqs = self._in_flight.popleft()
        assert result.step == step, f"result of step {result.step}, expected step {step}"
        updates = []
        token_ids = iter(result.token_ids.tolist())
        new_logprobs: dict[int, list[TokenLogprobs]] = {}  # by index of the row
        for block in read_blocks(result.logprobs):
            seq = seqs[block.index]
            if block.first_position >= seq.num_prompt_tokens:
                new_logprobs[block.index] = PackedLogprobs.from_block(block).unpack()
            elif seq.prompt_logprobs is not None:
                seq.prompt_logprobs.put(block)
        for i, (seq, num_yielded) in enumerate(zip(seqs, result.num_yielded.tolist(), strict=True)):
            seq.num_steps_in_flight -= 1
            for token_id in islice(token_ids, num_yielded):
                if seq.status is not Status.FINISHED:  # else the token is dropped
                    logprobs = new_logprobs.get(i) if new_logprobs else None
                    updates.append(self._append(seq, token_id, logprobs))
            if seq.num_steps_in_flight == 0 and seq in self._releasing:
                self._release(seq)
        return updates

    def _append(
        self, seq: Sequence, token_id: int, logprobs: list[TokenLogprobs] | None
    ) -> RequestUpdate:
        # this runs for every sampled token, so most sequences pay only for the two comparisons
        if seq.matcher is not None or seq.rules is not None:
            reason = seq.refuse(token_id)
            if reason is not None:
                return self._end_with_error(seq, reason)
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

    def _end_with_error(self, seq: Sequence, reason: str) -> RequestUpdate:
        """End a sequence that has no next token. Its excluded token is not returned."""
        self._end(seq)
        return RequestUpdate(seq.request_id, [], "error", reason, seq.num_cached_tokens)

    def _register_blocks(self, seq: Sequence, num_stored: int) -> None:
        """Add the full blocks among the first `num_stored` tokens to the prefix cache."""
        num_full = min(num_stored, len(seq.tokens)) // self._blocks.block_size
        if num_full <= seq.num_registered_blocks or seq.row < 0:
            return
        digests = self._blocks.digest_chain(seq.tokens, seq.block_digests)
        for i in range(seq.num_registered_blocks, min(num_full, len(digests))):
            self._blocks.register(seq.block_table[i], digests[i])
        seq.num_registered_blocks = num_full

    # ---- ending ------------------------------------------------------------------------------

    def _end(self, seq: Sequence) -> None:
        """Remove a sequence that has finished or was aborted. Later results ignore it."""
        del self._by_id[seq.request_id]
        if seq.status is Status.RUNNING:
            del self._running[seq]
            self._release_when_written(seq)
        else:
            del self._waiting[seq]
        seq.status = Status.FINISHED

    def _preempt(self, seq: Sequence) -> None:
        """Move a running sequence back to the head of the queue. It keeps its known tokens."""
        del self._running[seq]
        self._waiting[seq] = None
        self._waiting.move_to_end(seq, last=False)
        seq.status = Status.WAITING
        self.stats.num_preemptions += 1
        self._release_when_written(seq)

    def _release_when_written(self, seq: Sequence) -> None:
        """Release row and blocks now, or when the last step in flight has written to them."""
        if seq.num_steps_in_flight == 0:
            self._release(seq)
        else:
            self._releasing[seq] = self._blocks.num_freed_by(seq.block_table)

    def _release(self, seq: Sequence) -> None:
        self._releasing.pop(seq, None)
        self._blocks.release(seq.block_table)
        self._free_rows.append(seq.row)
        seq.reset()
