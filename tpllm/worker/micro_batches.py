"""Large steps in two halves: which ones, and where they are cut."""

from dataclasses import replace

import numpy as np
import torch

from tpllm.channel.step_plan import StepPlan
from tpllm.config.engine_config import EngineConfig
from tpllm.layers.attention.attention import BACKENDS

# Two halves pay where the GPU is busy for longer than the host, which launches twice as much.
_HALVED_BYTES = 64 << 20  # of a step's hidden states


def micro_batch_threshold(config: EngineConfig, dtype: torch.dtype) -> int | None:
    """Tokens from which on a step runs in two halves, if the GPUs can; None if no step does."""
    if not BACKENDS[config.attention_backend].prefill_capturable:
        return None  # lengths are read on the host, so that the halves would follow each other
    num_tokens = -(-_HALVED_BYTES // (config.model_config.hidden_size * dtype.itemsize))
    most = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
    return num_tokens if num_tokens <= most else None


def split_plan(plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    """The plan's tokens in two halves.

    A chunk in the middle is cut in two; the second part of it has the first as context. What is of
    no interest to a forward stays as it is.
    """
    D, ends = plan.num_decode, np.cumsum(plan.num_tokens)
    middle = int(ends[-1]) // 2
    last = int(np.searchsorted(ends, middle))  # row of the first half's last token
    taken = plan.num_tokens[last] - (ends[last] - middle)
    num_first, num_second = plan.num_tokens[: last + 1].copy(), plan.num_tokens[last:].copy()
    starts = plan.starts[last:].copy()
    num_first[-1] = taken
    num_second[0] -= taken
    starts[0] += taken
    left = slice(int(num_second[0] == 0), None)
    num_ids = max(0, middle - D)
    first = replace(
        plan,
        num_decode=min(D, middle),
        rows=plan.rows[: last + 1],
        starts=plan.starts[: last + 1],
        num_tokens=num_first,
        token_ids=plan.token_ids[:num_ids],
    )
    second = replace(
        plan,
        num_decode=max(0, D - middle),
        rows=plan.rows[last:][left],
        starts=starts[left],
        num_tokens=num_second[left],
        token_ids=plan.token_ids[num_ids:],
    )
    return first, second
