"""Large steps as two micro-batches: which steps, and how their tokens are divided."""

from dataclasses import replace

import numpy as np
import torch

from tpllm.channel.step_plan import StepPlan
from tpllm.config.engine_config import EngineConfig
from tpllm.layers.attention.attention import BACKENDS

# Two micro-batches need twice the launches: they pay if the GPU computes longer than that.
_MICRO_BATCH_BYTES = 64 << 20  # of a step's hidden states


def micro_batch_threshold(config: EngineConfig, dtype: torch.dtype) -> int | None:
    """Return the tokens from which on a step runs as two micro-batches; None if no step does."""
    if not BACKENDS[config.attention_backend].prefill_capturable:
        return None  # it reads lengths on the host, which would serialize the micro-batches
    num_tokens = -(-_MICRO_BATCH_BYTES // (config.model_config.hidden_size * dtype.itemsize))
    most = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
    return num_tokens if num_tokens <= most else None


def split_plan(plan: StepPlan) -> tuple[StepPlan, StepPlan]:
    """Divide the plan's tokens into two plans, one for each micro-batch.

    A chunk in the middle is split into two chunks; the second one has the first as context. Fields
    that the forward does not read are copied unchanged.
    """
    D, ends = plan.num_decode, np.cumsum(plan.num_tokens)
    middle = int(ends[-1]) // 2
    last = int(np.searchsorted(ends, middle))  # row of the first micro-batch's last token
    taken = plan.num_tokens[last] - (ends[last] - middle)
    num_first, num_second = plan.num_tokens[: last + 1].copy(), plan.num_tokens[last:].copy()
    starts = plan.starts[last:].copy()
    num_first[-1] = taken
    num_second[0] -= taken
    starts[0] += taken
    kept = slice(int(num_second[0] == 0), None)
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
        rows=plan.rows[last:][kept],
        starts=starts[kept],
        num_tokens=num_second[kept],
        token_ids=plan.token_ids[num_ids:],
    )
    return first, second
