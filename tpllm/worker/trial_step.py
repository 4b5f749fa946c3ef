"""The steps that take the most memory; a worker runs them once before it sizes the cache."""

from dataclasses import replace

import numpy as np

from tpllm.channel.row_record import LISTS, new_records, words_of
from tpllm.channel.step_plan import PlanLimits, StepPlan
from tpllm.sampling.row_table import upload
from tpllm.sampling_params import MAX_LOGPROBS
from tpllm.worker.model_runner import ModelRunner
from tpllm.worker.step_times import StepMarks

# All options that process whole rows of the vocabulary.
_COSTLIEST = {"num_prompt_tokens": 2**31 - 1, "top_k": 1, "top_p": 0.5, "repetition_penalty": 1.5}


def largest_step(limits: PlanLimits, row: int) -> StepPlan:
    """Return a step with the maximum of tokens and of sampled rows, all of them `row`."""
    S = limits.max_num_seqs
    num_tokens = min(limits.max_num_batched_tokens, S * limits.max_tokens_per_seq)
    chunk, rest = divmod(num_tokens, S)
    entering = new_records(1)
    entering["row"] = row
    for name, value in _COSTLIEST.items():
        entering[name] = value
    for name in ("num_logprobs", "num_prompt_logprobs"):
        entering[name] = min(MAX_LOGPROBS, limits.vocab_size)
    entering["list_sizes"][0, list(LISTS).index("allowed_ids")] = 1
    return StepPlan(
        step=-1,
        num_decode=0,
        rows=np.full(S, row, dtype=np.int32),
        starts=np.zeros(S, dtype=np.int32),
        num_tokens=chunk + (np.arange(S, dtype=np.int32) < rest).astype(np.int32),
        samples=np.ones(S, dtype=np.int32),
        entering=entering,
        block_updates=np.empty((0, 2), dtype=np.int32),
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        row_lists=np.zeros(1, dtype=np.int32),
    )


def run_largest_steps(runner: ModelRunner, marks: StepMarks) -> None:
    """Run the steps that take the most memory, on the reserved block and the padding row."""
    threshold = runner.micro_batch_threshold
    sizes = {runner.limits.max_num_batched_tokens}
    if threshold is not None and threshold > max(sizes) // 2:
        sizes.add(threshold - 1)  # without micro-batches it takes more memory
    for size in sorted(sizes):
        num_seqs = min(runner.limits.max_num_seqs, size)
        limits = replace(runner.limits, max_num_batched_tokens=size, max_num_seqs=num_seqs)
        plan = largest_step(limits, runner.state.padding_row)
        runner.run(plan, marks)
        reset = new_records(1)
        reset["row"] = runner.state.padding_row
        runner.row_table.enter(reset, plan.row_lists[:0])
        runner.row_table.store(upload(words_of(reset), runner.row_table.words.device))
