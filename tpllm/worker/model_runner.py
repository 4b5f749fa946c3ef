"""Execution of step plans on this rank's shard of the model: upload, forward, sampling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.row_record import row_words
from tpllm.channel.step_plan import PlanLimits, StepMasks, StepPlan
from tpllm.layers.attention.attention import KVCache
from tpllm.layers.attention.split_schedule import SPLIT_WORDS, ContextSplit, SplitSchedules
from tpllm.models.decoder import Decoder
from tpllm.parallel.group import TPGroup
from tpllm.sampling.prompt_logprobs import prompt_logprobs
from tpllm.sampling.row_table import RowTable, SampledRows
from tpllm.sampling.token_sampler import RowsToSample, StepOutput, TokenSampler
from tpllm.worker.batch_state import BatchState
from tpllm.worker.cuda_graphs import (
    MAX_CHUNKS,
    CapturedStep,
    GraphPool,
    StepSize,
    decode_sizes,
    mixed_sizes,
    padded_size,
)
from tpllm.worker.micro_batches import split_plan
from tpllm.worker.staging import HostStaging
from tpllm.worker.step_inputs import (
    ChunkLengths,
    StepInputs,
    chunk_lengths,
    decode_inputs,
    micro_batch,
    mixed_inputs,
    padded,
    upload_sizes,
)
from tpllm.worker.step_times import StepMarks

_NOTHING = np.empty(0, dtype=np.int32)
_NO_STEP = StepPlan(0, 0, *[_NOTHING] * 8)


class ModelRunner:
    """One rank's model, batch and cache.

    Every step is laid out as `StepInputs` and uploaded in one copy. Decode steps and small mixed
    steps have a size: they are padded to one of a few and read only fixed buffers, so that they can
    be CUDA graphs. Other steps run eagerly with their true sizes, a large one as two micro-batches,
    so that one computes while the other is all-reduced.

    Args:
        model: this rank's shard, weights loaded.
        padded_decode: pad decode steps (on a GPU, with an attention backend that can be captured).
        padded_mixed: likewise small mixed steps.
        micro_batch_threshold: tokens from which on the forward runs as two micro-batches; None for
            never.
        receive_masks: waits for the masks of a step whose forward has been launched.
    """

    def __init__(
        self,
        model: Decoder,
        tp: TPGroup,
        limits: PlanLimits,
        vocab_size: int,
        *,
        padded_decode: bool,
        padded_mixed: bool,
        micro_batch_threshold: int | None = None,
        receive_masks: Callable[[int], StepMasks],
    ) -> None:
        self.model = model
        self.limits = limits
        self.micro_batch_threshold = micro_batch_threshold
        self._tp = tp
        self._split = ContextSplit(model.local_num_kv_heads)
        self._split_schedules = SplitSchedules(self._split)
        self._kv_caches: list[KVCache] = []
        S, N = limits.max_num_seqs, limits.max_num_batched_tokens
        self.state = BatchState(S, limits.max_blocks_per_seq, limits.block_size, tp.device)
        lm_head = model.lm_head
        self.row_table = RowTable(limits, lm_head.vocab_start, lm_head.local_vocab_size, tp.device)
        self._sampler = TokenSampler(
            self.row_table, lm_head.vocab_start, vocab_size, tp, receive_masks
        )
        sizes = [StepSize(size, size, 0) for size in decode_sizes(S)] if padded_decode else []
        self._sizes = sorted(sizes + (mixed_sizes(N, S) if padded_mixed else []))
        self._forwards: dict[StepSize, CapturedStep] = {}
        self._samplings: dict[StepSize, CapturedStep] = {}  # of decode steps
        self._sampled_rows: dict[StepSize, SampledRows] = {}
        # all graphs of decode steps write their logits here
        self._logits = lm_head.weight.new_empty(S if padded_decode else 0, lm_head.local_vocab_size)
        words = 3 * N + 8 * (S + 1) + row_words() * S + 2 * limits.max_block_updates
        words += 3 * MAX_CHUNKS + 64 + SPLIT_WORDS * 2 * self._split.num_splits(S)
        self._staging = HostStaging(words, tp.device)

    # ---- CUDA graphs -------------------------------------------------------------------------

    @property
    def graph_sizes(self) -> list[StepSize]:
        """Return the sizes that can have graphs: mixed steps, then decode steps, largest first."""
        return sorted(self._sizes, key=lambda size: (size.num_chunks, size), reverse=True)

    def use_cache(self, kv_caches: list[KVCache]) -> None:
        """Use this cache from now on, and drop the graphs of an earlier one."""
        self._forwards, self._samplings = {}, {}
        self._kv_caches = kv_caches

    @torch.inference_mode()
    def capture_graphs(
        self, sizes: Sequence[StepSize], after_each: Callable[[], None] = lambda: None
    ) -> None:
        """Capture steps of these sizes, in this order, for the current cache."""
        self._forwards, self._samplings = {}, {}  # frees their memory
        pool = GraphPool()
        for size in sizes:
            self._upload_padding(size)
            forward = self._forwards[size] = pool.capture(partial(self._forward, size))
            if not size.num_chunks:
                sample = partial(self.sample, forward.result, self._decode_rows(size))
                self._samplings[size] = pool.capture(sample)
            after_each()

    def _upload_padding(self, size: StepSize) -> None:
        """Upload a step of padding only: rows of earlier steps may point to invalid blocks."""
        self._staging.send(self._lay_out(_NO_STEP, size).arrays())

    # ---- a step ------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, plan: StepPlan, marks: StepMarks) -> StepOutput:
        """Compute one step; every rank calls this together.

        The next step may overwrite the returned tokens: copy them on the current stream.
        """
        self.row_table.enter(plan.entering, plan.row_lists)
        D = plan.num_decode
        step = StepSize(D + plan.token_ids.size, D, plan.rows.size - D)
        marks.is_decode = not step.num_chunks
        size = padded_size(self._sizes, step) or (step if marks.is_decode else None)
        plans: Sequence[StepPlan] = [plan]
        if size is None and step.num_tokens >= (self.micro_batch_threshold or math.inf):
            plans = split_plan(plan)
        inputs = [array for each in plans for array in self._lay_out(each, size).arrays()]
        sampled = plan.samples.nonzero()[0]
        more: list[np.ndarray] = []  # a decode step samples the rows of its forward
        if not marks.is_decode:
            last_tokens, ends = np.cumsum(plan.num_tokens) - 1, plan.starts + plan.num_tokens
            more = [plan.entering.view(np.int32)]
            more += [array[sampled] for array in (last_tokens, plan.rows, ends)]
        marks.begin()
        slices = self._staging.send([*inputs, plan.block_updates, *more])
        # Most decode steps have no updates and no options. They create no views, because at batch
        # size 1 the host takes almost as long as the GPU.
        if plan.block_updates.size:
            self.state.apply(self._staging.buffer[slices[len(inputs)]])
        if size is None:
            hidden = self._run_eagerly(plans, self._views(slices[: len(inputs)]))
        elif graph := self._forwards.get(size):
            hidden = graph.replay()
        else:
            hidden = self._forward(size, marks.sample)
        if marks.is_decode:
            assert size and not len(plan.entering), "a row enters with a prefill chunk"
            return self._sample(plan, sampled, hidden, self._decode_rows(size), size)
        marks.sample()
        entering, where, rows, positions = self._views(slices[-4:])
        self.row_table.store(entering)
        compute_logits = self.model.compute_logits
        logprobs = prompt_logprobs(plan, hidden, compute_logits, self.row_table, self._sampler)
        if not sampled.size:  # no row reaches the end of its prompt
            return StepOutput(where, logprobs)
        sampled_rows = SampledRows(self.row_table.words, rows, positions)
        output = self._sample(plan, sampled, compute_logits(hidden[where]), sampled_rows, size)
        output.logprobs += logprobs
        return output

    def _views(self, slices: list[slice]) -> list[Tensor]:
        return [self._staging.buffer[where] for where in slices]

    def _lay_out(self, plan: StepPlan, size: StepSize | None) -> StepInputs[np.ndarray]:
        """Return a plan's inputs, padded to `size` or with their true sizes."""
        padding_row = self.state.padding_row
        if size is None:
            return mixed_inputs(plan, self._split)
        if size.num_chunks:
            return padded(mixed_inputs(plan, self._split), size, padding_row, self._split)
        return decode_inputs(plan, size.num_decode, padding_row, self._split_schedules.next)

    def _run_eagerly(self, plans: Sequence[StepPlan], inputs: list[Tensor]) -> Tensor:
        """Run the plans as micro-batches, each with its copy stream if there are several.

        `inputs` are the inputs of all plans, concatenated.
        """
        streams = self._tp.copy_streams if len(plans) > 1 else ()
        num_each = len(inputs) // len(plans)
        micro_batches = []
        for i, plan in enumerate(plans):
            arrays = inputs[i * num_each : (i + 1) * num_each]
            batch = micro_batch(StepInputs.of(arrays), self.state, chunk_lengths(plan))
            micro_batches.append(replace(batch, copy_stream=streams[i] if streams else None))
        return self.model(micro_batches, self._kv_caches)

    def _forward(self, size: StepSize, mark_sampling: Callable[[], None] = lambda: None) -> Tensor:
        """Run the uploaded step of this size, using only fixed buffers.

        Returns:
            the logits [S, Vl] of a decode step, the hidden states [N, E] of another
        """
        inputs = StepInputs.of(self._staging.views(upload_sizes(size, self._split)))
        lengths = ChunkLengths(size.num_tokens, self.limits.max_tokens_per_seq, has_context=True)
        hidden = self.model([micro_batch(inputs, self.state, lengths)], self._kv_caches)
        if size.num_chunks:
            return hidden
        mark_sampling()
        out = self._logits[: size.num_decode] if len(self._logits) else None
        return self.model.compute_logits(hidden, out)

    # ---- sampling ----------------------------------------------------------------------------

    def sample(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """Sample a token for each of `rows` [S] by temperature alone: [S] int32."""
        tokens = self._sampler.sample(logits, rows)
        self.state.last_tokens[rows.rows] = tokens  # the next step's input stays on the device
        return tokens

    def _sample(
        self,
        plan: StepPlan,
        sampled: np.ndarray,
        logits: Tensor,
        rows: SampledRows,
        size: StepSize | None,
    ) -> StepOutput:
        """Sample a token for each of S rows once: by temperature, or as their options ask.

        Args:
            sampled: [S] indices of the rows in the plan
            logits, rows: of these rows, possibly followed by padding
        """
        S, graph = sampled.size, self._samplings.get(size) if size else None
        sample = graph.replay if graph else partial(self.sample, logits, rows)
        if not self.row_table.has_options:
            return StepOutput(sample()[:S])
        ends, rows = plan.starts + plan.num_tokens, rows.first(S)
        to_sample = RowsToSample(plan.step, sampled, plan.rows[sampled], ends[sampled], rows)
        tokens = self._sampler.sample_changed(logits[:S], to_sample)
        if tokens is None:
            tokens = sample()[:S]
        else:
            self.state.last_tokens[rows.rows] = tokens
        return self._sampler.finish(logits[:S], tokens, to_sample)

    def _decode_rows(self, size: StepSize) -> SampledRows:
        """Return the rows of a decode step, in fixed buffers; made once for each size."""
        if size not in self._sampled_rows:
            S = size.num_decode
            # the new token's index is the number of tokens before it
            positions = self.state.decode_inputs(S).context_lens
            rows = SampledRows(self.row_table.words, self._staging.buffer[:S], positions)
            self._sampled_rows[size] = rows
        return self._sampled_rows[size]
