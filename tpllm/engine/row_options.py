"""Converts a request's SamplingParams into the RowOptions that its row carries to the workers."""

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
    """Return the settings that do not fit in the row state; None if there are none.

    Args:
        bad_word_ids: the token ids of each of `params.bad_words`, none of them empty.
        masked_ids: the end tokens that `min_tokens` excludes. A few of them fit in the row state,
            where excluding them takes no time.
    """
    bias = params.logit_bias or {}
    is_random = not params.is_greedy  # top-k, top-p and min-p always keep the likeliest token
    options = RowOptions(
        num_prompt_tokens=num_prompt_tokens,
        top_k=max(0, params.top_k) if is_random else 0,
        top_p=params.top_p if is_random else 1.0,
        min_p=params.min_p if is_random else 0.0,
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
    has_logprobs = max(options.num_logprobs, options.num_prompt_logprobs) >= 0
    is_needed = options.truncates or options.has_penalties or has_logprobs or options.is_masked
    is_needed = is_needed or options.list_words > options.banned_ids.size
    return options if is_needed or len(masked_ids) > MAX_MASKED_STOP_IDS else None


def _int32(ids: Collection[int]) -> np.ndarray:
    return np.array(list(ids), dtype=np.int32)
