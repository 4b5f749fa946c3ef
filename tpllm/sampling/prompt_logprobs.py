"""Log-probabilities of prompt tokens, from the hidden states of a step's prefill chunks."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from tpllm.channel.step_plan import StepPlan
from tpllm.sampling.row_table import RowTable, upload
from tpllm.sampling.token_sampler import LogprobWords, TokenSampler


def prompt_logprobs(
    plan: StepPlan,
    hidden: Tensor,
    compute_logits: Callable[[Tensor], Tensor],
    table: RowTable,
    sampler: TokenSampler,
) -> list[LogprobWords]:
    """Return log-probabilities of the prompt tokens that hidden states predict, if requested.

    Args:
        hidden: [N, E], possibly followed by padding
        compute_logits: [n, E] to this rank's logits [n, Vl]
    """
    if not table.has_options:
        return []
    blocks, indices, places = [], [], []
    width = table.tokens.shape[1]
    first_tokens = np.cumsum(plan.num_tokens) - plan.num_tokens  # [S] in the step
    records = table.records[plan.rows]
    for i in np.flatnonzero(records["num_prompt_logprobs"] >= 0).tolist():
        row, start = int(plan.rows[i]), int(plan.starts[i])
        n = min(int(plan.num_tokens[i]), int(records["num_prompt_tokens"][i]) - 1 - start)
        if n > 0:  # otherwise the chunk is the prompt's last token, which predicts a new token
            blocks.append((i, start + 1, n, int(records["num_prompt_logprobs"][i])))
            indices.append(first_tokens[i] + np.arange(n, dtype=np.int64))
            places.append(row * width + start + 1 + np.arange(n, dtype=np.int64))
    if not blocks:
        return []
    where = upload(np.concatenate(indices), hidden.device)
    tokens = table.tokens.view(-1)[upload(np.concatenate(places), hidden.device)]
    words = sampler.logprob_words(
        lambda begin, end: compute_logits(hidden[where[begin:end]]),
        tokens,
        max(k for *_, k in blocks),
    )
    return [LogprobWords(words, blocks)]
