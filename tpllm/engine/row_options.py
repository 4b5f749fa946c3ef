"""Says what a request's SamplingParams ask of sampling, as its row's fields and lists."""

from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np

from tpllm.channel.row_record import (
    DEFAULTS,
    LISTS,
    MAX_STOP_IDS,
    TRUNCATIONS,
    Lists,
    new_records,
)
from tpllm.sampling_params import SamplingParams


def row_fields(
    params: SamplingParams,
    num_prompt_tokens: int,
    seed: int,
    bad_word_ids: Sequence[Sequence[int]] = (),
    early_end_ids: Collection[int] = (),
) -> tuple[dict[str, Any], Lists]:
    """Return the fields of a row but `row`, and its lists that are not empty, without the tokens.

    A field is that of `params` with the same name, if there is one. Fields are Python's numbers:
    `StepBuilder` writes the records of all entering rows at once, a fourth of the time.

    Args:
        bad_word_ids: the token ids of each of `params.bad_words`, none of them empty.
        early_end_ids: the end tokens that `min_tokens` excludes.
    """
    kind: type = type(params)
    names = _shared(kind, new_records(0).dtype.names or ())
    fields: dict[str, Any] = {name: getattr(params, name) or 0 for name in names}
    fields["seed"] = seed
    fields["num_prompt_tokens"] = num_prompt_tokens
    fields["min_position"] = num_prompt_tokens + params.min_tokens
    fields["top_k"] = max(0, params.top_k)
    if params.is_greedy:  # the likeliest token is always kept
        for name in TRUNCATIONS:
            fields[name] = DEFAULTS.get(name, 0)
    fields["num_logprobs"] = -1 if params.logprobs is None else params.logprobs
    fields["num_prompt_logprobs"] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
    fields["is_masked"] = params.structured_outputs is not None
    # The kernel excludes stop ids, after top-k, top-p and min-p have chosen among all others.
    fits = len(early_end_ids) <= MAX_STOP_IDS
    stop_ids = list(early_end_ids) if fits else []
    fields["stop_ids"] = stop_ids + [DEFAULTS["stop_ids"]] * (MAX_STOP_IDS - len(stop_ids))
    is_banned = not fits or asks_for(fields, TRUNCATIONS)
    bias = params.logit_bias or {}
    lists: dict[str, Collection[float]] = {
        "bias_ids": bias,
        "bias_values": bias.values(),
        "banned_ids": early_end_ids if is_banned else (),
        "allowed_ids": params.allowed_token_ids or (),
        "bad_word_ids": [id_ for word in bad_word_ids for id_ in word],
        "bad_word_ends": list(accumulate(map(len, bad_word_ids))),
    }
    fields["list_sizes"] = [*map(len, lists.values()), 0]  # the last is for the tokens
    return fields, {name: np.array(list(x), LISTS[name]) for name, x in lists.items() if x}


def asks_for(fields: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether one of these fields has another value than the default."""
    return any(fields[name] != DEFAULTS.get(name, 0) for name in names)


@cache
def _shared(params: type, record_fields: tuple[str, ...]) -> list[str]:
    """Return the names of the fields that both have."""
    return [name for name in record_fields if hasattr(params, name)]
