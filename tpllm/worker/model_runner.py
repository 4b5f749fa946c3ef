"""Execution of step plans on this rank's shard of the model: batch state, forward, sampling."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.step_plan import ENTERING_WORDS, PlanLimits, StepMasks, StepPlan
from tpllm.layers.attention.attention import AttentionBatch, KVCache, PrefillBatch
from tpllm.layers.attention.split_schedule import SPLIT_WORDS, ContextSplit, SplitSchedules
from tpllm.models.decoder import Decoder
from tpllm.models.micro_batch import MicroBatch
from tpllm.parallel.group import TPGroup
from tpllm.sampling.option_table import OptionTable, upload
from tpllm.sampling.sampler import SamplingBatch
from tpllm.sampling.token_sampler import LogprobWords, RowsToSample, StepOutput, TokenSampler
from tpllm.worker.batch_state import BatchState, DecodeInputs, gather_decode_inputs
from tpllm.worker.cuda_graphs import (
    MAX_CHUNKS,
    CapturedStep,
    GraphPool,
    MixedSize,
    decode_sizes,
    mixed_sizes,
    padded_mixed_size,
    padded_size,
)
from tpllm.worker.micro_batches import split_plan
from tpllm.worker.mixed_inputs import (
    LAST_TOKEN,
    MixedInputs,
    mixed_inputs,
    no_inputs,
    padded,
    upload_sizes,
)
from tpllm.worker.staging import HostStaging
from tpllm.worker.step_times import StepMarks
from tpllm.worker.trial_step import largest_step

Mark = Callable[[], None]
Forward = Callable[[Sequence[Tensor]], Tensor]


class ModelRunner:
    """One rank's model, batch and cache.

    A pure decode step, and the forward of a small mixed step, are padded to one of a few sizes and
    read only fixed buffers, so that they can be CUDA graphs. Every other step runs eagerly with its
    true sizes. A large step runs as two micro-batches, so that one computes while the other is
    all-reduced.

    Args:
        model: this rank's shard, weights loaded.
        padded_decode: run decode steps padded, from fixed buffers (on a GPU, with an attention
            backend that can be captured).
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
        self._model = model
        self._tp = tp
        self._limits = limits
        self._uses_padded_decode = padded_decode
        self._uses_padded_mixed = padded_mixed
        self._micro_batch_threshold = micro_batch_threshold
        self._split = ContextSplit(model.local_num_kv_heads)
        self._split_schedules = SplitSchedules(self._split)
        self._kv_caches: list[KVCache] = []
        self._decode_graphs: dict[int, CapturedStep] = {}
        self._mixed_graphs: dict[MixedSize, CapturedStep] = {}
        self.state = BatchState(
            limits.max_num_seqs, limits.max_blocks_per_seq, limits.block_size, tp.device
        )
        lm_head = model.lm_head
        self._options = OptionTable(
            limits, lm_head.vocab_start, lm_head.local_vocab_size, tp.device
        )
        self._sampler = TokenSampler(
            self._options, lm_head.vocab_start, vocab_size, tp, receive_masks
        )
        # All graphs share it; rows with options read the logits of the last step from it.
        self._decode_logits = lm_head.weight.new_empty(
            limits.max_num_seqs if padded_decode else 0, lm_head.local_vocab_size
        )
        words = 3 * limits.max_num_batched_tokens + 8 * (limits.max_num_seqs + 1)
        words += ENTERING_WORDS * limits.max_num_seqs + 2 * limits.max_block_updates
        words += 3 * MAX_CHUNKS + 64
        words += SPLIT_WORDS * 2 * self._split.num_splits(limits.max_num_seqs)
        self._staging = HostStaging(words, tp.device)
        self.decode_sizes = decode_sizes(limits.max_num_seqs)
        self.mixed_sizes = mixed_sizes(limits.max_num_batched_tokens, limits.max_num_seqs)
        self._decode_inputs: dict[int, DecodeInputs] = {}  # by size, all in the same buffers

    @property
    def graph_sizes(self) -> list[int | MixedSize]:
        """Return the sizes of decode and mixed steps that can have a graph, the largest first."""
        mixed = self.mixed_sizes if self._uses_padded_mixed else []
        return [*reversed(mixed), *reversed(self.decode_sizes)]

    def use_cache(self, kv_caches: list[KVCache]) -> None:
        """Use this cache from now on, and drop the graphs of an earlier one."""
        self._drop_graphs()
        self._kv_caches = kv_caches

    @torch.inference_mode()
    def capture_graphs(
        self, sizes: Sequence[int | MixedSize], after_each: Callable[[], None] = lambda: None
    ) -> None:
        """Capture steps of these sizes, in this order, for the current cache."""
        self._drop_graphs()  # frees their memory
        pool = GraphPool()
        for size in sizes:
            self._upload_padding(size)
            if isinstance(size, MixedSize):
                self._mixed_graphs[size] = pool.capture(partial(self._run_padded, size))
            else:
                self._decode_graphs[size] = pool.capture(partial(self._decode, size))
            after_each()

    def _drop_graphs(self) -> None:
        self._decode_graphs, self._mixed_graphs = {}, {}

    def _upload_padding(self, size: int | MixedSize) -> None:
        """Upload a step of padding only: rows of earlier steps may point to invalid blocks."""
        if isinstance(size, MixedSize):
            inputs = padded(no_inputs(), size, self.state.padding_row, self._split)
            self._staging.upload(inputs.arrays())
        else:
            rows = np.full(size, self.state.padding_row, dtype=np.int32)
            starts = np.zeros_like(rows)
            self._staging.upload([rows, starts, self._split.schedule(starts + 1)])

    @torch.inference_mode()
    def run(self, plan: StepPlan, marks: StepMarks) -> StepOutput:
        """Compute one step; every rank calls this together.

        The next step may overwrite the returned tokens: copy them on the current stream.
        """
        self._options.enter(plan.entering[:, 0], plan.row_options)
        marks.is_decode = plan.num_decode == plan.rows.size
        if marks.is_decode and self._uses_padded_decode:
            return self._run_decode(plan, marks)
        return self._run_mixed(plan, marks)

    # ---- pure decode steps -------------------------------------------------------------------

    def _run_decode(self, plan: StepPlan, marks: StepMarks) -> StepOutput:
        S = plan.rows.size
        assert not len(plan.entering), "a row enters with a prefill chunk"
        size = padded_size(self.decode_sizes, S)
        rows = np.full(size, self.state.padding_row, dtype=np.int32)
        rows[:S] = plan.rows
        starts = np.zeros(size, dtype=np.int32)
        starts[:S] = plan.starts
        split_schedule = self._split_schedules.next(starts + 1)
        marks.begin()
        # Most steps have no updates and no options. They create no views, because at batch size 1
        # the host takes almost as long as the GPU.
        *_, where = self._staging.send([rows, starts, split_schedule, plan.block_updates])
        if plan.block_updates.size:
            updates = self._staging.buffer[where]
            self.state.apply(updates[:0], updates)
        if graph := self._decode_graphs.get(size):
            graph.graph.replay()
            tokens = graph.result
        else:
            tokens = self._decode(size, marks.sample)
        if not len(self._options):
            return StepOutput(tokens[:S])
        inputs = self._inputs_of(size)
        to_sample = RowsToSample(
            plan.step, np.arange(S), plan.rows, plan.starts + 1, inputs.sampling
        )
        return self._finish(self._decode_logits[:S], tokens[:S], inputs.rows[:S], to_sample)

    def _decode(self, size: int, mark_sampling: Mark = lambda: None) -> Tensor:
        """Sample one token for each of the `size` uploaded rows, using only fixed buffers."""
        inputs = self._inputs_of(size)
        gather_decode_inputs(self.state, inputs)
        batch = AttentionBatch(
            slot_mapping=inputs.slots,
            num_decode=size,
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            split_schedule=inputs.split_schedule,
            prefill=None,
        )
        micro_batch = MicroBatch(inputs.input_ids, inputs.positions, batch)
        hidden = self._model([micro_batch], self._kv_caches)
        mark_sampling()
        logits = self._model.compute_logits(hidden, out=self._decode_logits[:size])
        return self._sample(logits, inputs.rows, inputs.sampling)

    def _inputs_of(self, size: int) -> DecodeInputs:
        inputs = self._decode_inputs.get(size)
        if inputs is None:
            plan_words = self._split.num_splits(size) * SPLIT_WORDS
            rows, starts, words = self._staging.views([size, size, plan_words])
            split_schedule = words.view(-1, SPLIT_WORDS)
            largest = self.decode_sizes[-1]
            if size == largest:
                max_blocks, device = self._limits.max_blocks_per_seq, self._tp.device
                inputs = DecodeInputs.empty(rows, starts, split_schedule, max_blocks, device)
            else:
                inputs = self._inputs_of(largest).first(rows, starts, split_schedule)
            self._decode_inputs[size] = inputs
        return inputs

    def _sample(self, logits: Tensor, rows: Tensor, batch: SamplingBatch) -> Tensor:
        tokens = self._sampler.sample(logits, batch)
        self.state.last_tokens[rows] = tokens  # the next step's input stays on the device
        return tokens

    def _finish(
        self, logits: Tensor, tokens: Tensor, rows: Tensor, to_sample: RowsToSample
    ) -> StepOutput:
        if not len(self._options):
            return StepOutput(tokens)
        output = self._sampler.finish(logits, tokens, to_sample)
        self.state.last_tokens[rows] = output.tokens  # some were sampled again
        return output

    # ---- other steps -------------------------------------------------------------------------

    def _run_mixed(self, plan: StepPlan, marks: StepMarks) -> StepOutput:
        ends = plan.starts + plan.num_tokens  # [S] context lengths after this step
        cu_seqlens = np.cumsum(plan.num_tokens)
        sampling_rows = np.flatnonzero(plan.samples)
        forward, inputs = self._mixed_forward(plan)
        marks.begin()
        views = self._staging.upload(
            [
                *inputs,
                plan.entering,
                plan.block_updates,
                cu_seqlens[sampling_rows] - 1,
                plan.rows[sampling_rows],
                ends[sampling_rows],
            ]
        )
        entering, updates, last_indices, sample_rows, sample_positions = views[len(inputs) :]
        self.state.apply(entering, updates)
        hidden = forward(views[: len(inputs)])
        marks.sample()
        prompt_logprobs = self._prompt_logprobs(plan, hidden, cu_seqlens - plan.num_tokens)
        if sampling_rows.size == 0:  # no row reaches the end of its prompt
            return StepOutput(last_indices, prompt_logprobs)
        logits = self._model.compute_logits(hidden[last_indices])  # [S, Vl]
        sampling = self.state.sampling(sample_rows, sample_positions)
        tokens = self._sample(logits, sample_rows, sampling)
        to_sample = RowsToSample(
            plan.step, sampling_rows, plan.rows[sampling_rows], ends[sampling_rows], sampling
        )
        output = self._finish(logits, tokens, sample_rows, to_sample)
        output.logprobs += prompt_logprobs
        return output

    def _mixed_forward(self, plan: StepPlan) -> tuple[Forward, list[np.ndarray]]:
        """Return a function from uploaded inputs to hidden states [N, E], and these inputs."""
        num_tokens, num_chunks = int(plan.num_tokens.sum()), plan.rows.size - plan.num_decode
        size = None
        if self._uses_padded_mixed:
            size = padded_mixed_size(self.mixed_sizes, num_tokens, plan.num_decode, num_chunks)
        if size is not None:
            inputs = mixed_inputs(plan, self._split)
            inputs = padded(inputs, size, self.state.padding_row, self._split)
            return partial(self._replay_mixed, size), inputs.arrays()
        is_split = (
            self._micro_batch_threshold is not None and num_tokens >= self._micro_batch_threshold
        )
        plans = split_plan(plan) if is_split else (plan,)
        arrays = [array for each in plans for array in mixed_inputs(each, self._split).arrays()]
        return partial(self._run_eagerly, plans), arrays

    def _replay_mixed(self, size: MixedSize, _: Sequence[Tensor]) -> Tensor:
        graph = self._mixed_graphs.get(size)
        if graph is None:
            return self._run_padded(size)
        graph.graph.replay()
        return graph.result

    def _run_eagerly(self, plans: Sequence[StepPlan], inputs: Sequence[Tensor]) -> Tensor:
        """Run the plans as micro-batches, each with its copy stream if there are several.

        `inputs` are the inputs of all plans, concatenated.
        """
        copy_streams = (
            self._tp.copy_streams
            if len(plans) > 1 and self._tp.copy_streams
            else [None] * len(plans)
        )
        num_each = len(inputs) // len(plans)
        micro_batches = []
        for i, (plan, copy_stream) in enumerate(zip(plans, copy_streams, strict=True)):
            chunks = slice(plan.num_decode, None)
            micro_batch = self._make_micro_batch(
                MixedInputs(*inputs[i * num_each : (i + 1) * num_each]),
                max_seqlen_q=int(plan.num_tokens[chunks].max(initial=0)),
                max_seqlen_k=int((plan.starts + plan.num_tokens)[chunks].max(initial=0)),
                has_context=bool(plan.starts[chunks].any()),
            )
            micro_batches.append(replace(micro_batch, copy_stream=copy_stream))
        return self._model(micro_batches, self._kv_caches)

    def _run_padded(self, size: MixedSize) -> Tensor:
        """Return hidden states of the uploaded step, padded to `size`; read only fixed buffers."""
        inputs = MixedInputs(*self._staging.views(upload_sizes(size, self._split)))
        longest = self._limits.max_blocks_per_seq * self._limits.block_size
        micro_batch = self._make_micro_batch(
            inputs, max_seqlen_q=size.num_tokens, max_seqlen_k=longest, has_context=True
        )
        return self._model([micro_batch], self._kv_caches)

    def _make_micro_batch(
        self,
        inputs: MixedInputs[Tensor],
        *,
        max_seqlen_q: int,
        max_seqlen_k: int,
        has_context: bool,
    ) -> MicroBatch:
        """Return the micro-batch of these tokens; see `PrefillBatch` for the arguments."""
        state = self.state
        num_decode = inputs.context_lens.numel()
        prefill = None
        if inputs.chunk_rows.numel():
            prefill = PrefillBatch(
                cu_seqlens_q=inputs.cu_seqlens_q,
                cu_seqlens_k=inputs.cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                block_tables=state.block_tables[inputs.chunk_rows],
                has_context=has_context,
            )
        batch = AttentionBatch(
            slot_mapping=state.slots(inputs.token_rows, inputs.positions),
            num_decode=num_decode,
            context_lens=inputs.context_lens,
            block_tables=state.block_tables[inputs.token_rows[:num_decode]],
            split_schedule=inputs.split_schedule.view(-1, SPLIT_WORDS),
            prefill=prefill,
        )
        last_tokens = state.last_tokens[inputs.token_rows]
        input_ids = torch.where(inputs.token_ids == LAST_TOKEN, last_tokens, inputs.token_ids)
        return MicroBatch(input_ids, inputs.positions, batch)

    def _prompt_logprobs(
        self, plan: StepPlan, hidden: Tensor, first_tokens: np.ndarray
    ) -> list[LogprobWords]:
        """Return log-probabilities of the prompt tokens that hidden states predict, if requested.

        Args:
            hidden: [N, E], possibly followed by padding
            first_tokens: [S], index of each row's first token in the step
        """
        blocks, indices, places = [], [], []
        width = self._options.tokens.shape[1]
        for i in range(plan.num_decode, plan.rows.size if len(self._options) else 0):
            row, start = int(plan.rows[i]), int(plan.starts[i])
            options = self._options.of(row)
            if options is None or options.num_prompt_logprobs < 0:
                continue
            n = min(int(plan.num_tokens[i]), options.num_prompt_tokens - 1 - start)
            if n > 0:  # otherwise the chunk is the prompt's last token, which predicts a new token
                blocks.append((i, start + 1, n, options.num_prompt_logprobs))
                indices.append(first_tokens[i] + np.arange(n, dtype=np.int64))
                places.append(row * width + start + 1 + np.arange(n, dtype=np.int64))
        if not blocks:
            return []
        device = self._tp.device
        where = upload(np.concatenate(indices), device)
        tokens = self._options.tokens.view(-1)[upload(np.concatenate(places), device)]
        words = self._sampler.logprob_words(
            lambda begin, end: self._model.compute_logits(hidden[where[begin:end]]),
            tokens,
            max(k for *_, k in blocks),
        )
        return [LogprobWords(words, blocks)]

    # ---- start-up and measurement ------------------------------------------------------------

    def run_largest_step(self, marks: StepMarks) -> None:
        """Run the steps that take the most memory, on the reserved block and the padding row."""
        sizes = {self._limits.max_num_batched_tokens}
        if (
            self._micro_batch_threshold is not None
            and self._micro_batch_threshold > max(sizes) // 2
        ):
            sizes.add(self._micro_batch_threshold - 1)  # without micro-batches it takes more memory
        for size in sorted(sizes):
            num_seqs = min(self._limits.max_num_seqs, size)
            limits = replace(self._limits, max_num_batched_tokens=size, max_num_seqs=num_seqs)
            plan = largest_step(limits, self.state.padding_row)
            self.run(plan, marks)
            self._options.enter(plan.entering[:, 0], plan.row_options[:0])

    @torch.inference_mode()
    def time_sampling(self, repeats: int = 20) -> float:
        """Return the milliseconds of LM head and sampling in the graph of the largest decode step.

        Events cannot be recorded inside a step's graph, so LM head and sampling are measured in a
        graph of their own. Every rank calls this together.
        """
        size = self.decode_sizes[-1]
        rows = torch.full((size,), self.state.padding_row, device=self._tp.device)
        lm_head = self._model.lm_head.weight
        hidden = torch.ones(size, lm_head.shape[1]).to(lm_head)
        batch = self.state.sampling(rows, torch.zeros_like(rows, dtype=torch.int32))
        batch.temperatures.fill_(1)  # the slower case: noise for every id

        def sample() -> None:
            self._sample(self._model.compute_logits(hidden), rows, batch)

        sample()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sample()
        marks = StepMarks(self._tp.device)
        marks.begin()
        for _ in range(repeats):
            graph.replay()
        marks.end()
        marks.wait_end()
        return marks.spans_ms(None)[0] / repeats
