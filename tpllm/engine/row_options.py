"""Writes what a request's SamplingParams ask of sampling into its row's record and lists."""

from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np

from tpllm.channel.row_record import (
    DEFAULTS,
    LISTS,
    MAX_STOP_IDS,
    TRUNCATIONS,
    Lists,
    differ,
    new_records,
)
from tpllm.sampling_params import SamplingParams


def row_record(
    params: SamplingParams,
    num_prompt_tokens: int,
    seed: int,
    bad_word_ids: Sequence[Sequence[int]] = (),
    early_end_ids: Collection[int] = (),
) -> tuple[np.ndarray, Lists]:
    """Return the record [1] of a row, and its lists that are not empty, without the tokens.

    A field is that of `params` with the same name, if there is one.

    Args:
        bad_word_ids: the token ids of each of `params.bad_words`, none of them empty.
        early_end_ids: the end tokens that `min_tokens` excludes.
    """
    record = new_records(1)
    for name in record.dtype.names or ():
        if hasattr(params, name):
            record[name] = getattr(params, name) or 0
    record["seed"] = seed
    record["num_prompt_tokens"] = num_prompt_tokens
    record["min_position"] = num_prompt_tokens + params.min_tokens
    record["top_k"] = max(0, params.top_k)
    if params.is_greedy:  # the likeliest token is always kept
        for name in TRUNCATIONS:
            record[name] = DEFAULTS.get(name, 0)
    record["num_logprobs"] = -1 if params.logprobs is None else params.logprobs
    record["num_prompt_logprobs"] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
    record["is_masked"] = params.structured_outputs is not None
    # The kernel excludes stop ids, after top-k, top-p and min-p have chosen among all others.
    fits = len(early_end_ids) <= MAX_STOP_IDS
    if fits:
        record["stop_ids"][0, : len(early_end_ids)] = list(early_end_ids)
    is_banned = not fits or differ(record, TRUNCATIONS)[0]
    bias = params.logit_bias or {}
    lists: dict[str, Collection[float]] = {
        "bias_ids": bias,
        "bias_values": bias.values(),
        "banned_ids": early_end_ids if is_banned else (),
        "allowed_ids": params.allowed_token_ids or (),
        "bad_word_ids": [id_ for word in bad_word_ids for id_ in word],
        "bad_word_ends": list(accumulate(map(len, bad_word_ids))),
    }
    record["list_sizes"][0, : len(lists)] = [len(each) for each in lists.values()]
    return record, {name: np.array(list(x), LISTS[name]) for name, x in lists.items() if x}
