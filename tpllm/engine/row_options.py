"""From a request's SamplingParams to what its row carries to the workers."""

from collections.abc import Collection, Sequence

import numpy as np

from tpllm.channel.row_options import RowOptions
from tpllm.channel.step_plan import MAX_MASKED_STOP_IDS
from tpllm.sampling_params import SamplingParams


def row_options(
    params: SamplingParams,
    num_prompt_tokens: int,
    bad_word_ids: Sequence[Sequence[int]] = (),
    masked_ids: Collection[int] = (),
) -> RowOptions | None:
    """What the request asks for beyond its row state; None where that is nothing.

    Args:
        bad_word_ids: the token sequences of `params.bad_words`, none of them empty.
        masked_ids: its end tokens, where `min_tokens` holds them back. A few of them fit in the row
            state, where holding them back costs nothing.
    """
    bias = params.logit_bias or {}
    draws = not params.is_greedy  # the likeliest token is never cut off
    options = RowOptions(
        num_prompt_tokens=num_prompt_tokens,
        top_k=max(0, params.top_k) if draws else 0,
        top_p=params.top_p if draws else 1.0,
        min_p=params.min_p if draws else 0.0,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        num_logprobs=-1 if params.logprobs is None else params.logprobs,
        num_prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        is_masked=params.structured_outputs is not None,
        bias_ids=_int32(bias),
        bias_values=np.array(list(bias.values()), dtype=np.float32),
        banned_ids=_int32(masked_ids),
        allowed_ids=_int32(params.allowed_token_ids or ()),
        bad_word_ids=_int32([id_ for word in bad_word_ids for id_ in word]),
        bad_word_ends=np.cumsum([len(word) for word in bad_word_ids], dtype=np.int32),
    )
    reports = max(options.num_logprobs, options.num_prompt_logprobs) >= 0
    asks = options.truncates or options.has_penalties or reports or options.is_masked
    asks = asks or options.list_words > options.banned_ids.size
    return options if asks or len(masked_ids) > MAX_MASKED_STOP_IDS else None


def _int32(ids: Collection[int]) -> np.ndarray:
    return np.array(list(ids), dtype=np.int32)
