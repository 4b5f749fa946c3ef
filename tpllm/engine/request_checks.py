"""Refuses requests that can never run, before they are queued.

Every function raises a ValueError that names the setting, its value and the mend.
"""

import numpy as np

from tpllm.checks import short
from tpllm.config.engine_config import EngineConfig
from tpllm.engine.request import AddRequest


def check_request(
    request: AddRequest, config: EngineConfig, max_total_tokens: int, capacity: str
) -> None:
    """Check a request against the model and the KV cache; `check_first_tokens` is left.

    Args:
        max_total_tokens: most tokens of a sequence
        capacity: the size of the KV cache in words
    """
    _check_prompt(request.prompt_token_ids, config, max_total_tokens, capacity)
    _check_lists(request, config)
    params, num_prompt_tokens = request.sampling_params, len(request.prompt_token_ids)
    if num_prompt_tokens + params.min_tokens > max_total_tokens:
        raise ValueError(
            f"min_tokens={params.min_tokens} after a prompt of {num_prompt_tokens} tokens is more "
            f"than the {max_total_tokens} tokens that a sequence may have; lower it, or "
            "raise max_model_len and num_kv_blocks"
        )
    if params.allowed_token_ids is not None:
        _check_allowed_tokens(request, config.model_config.eos_token_ids)


def check_first_tokens(request: AddRequest, first_mask: bytes) -> None:
    """Check that other settings leave a first token that the grammar allows.

    Args:
        first_mask: the tokens that the grammar allows first, a bit for each id
    """
    allowed = request.sampling_params.allowed_token_ids
    banned = _banned_tokens(request)
    if allowed is None and not banned:
        return
    bits = np.unpackbits(np.frombuffer(first_mask, np.uint8), bitorder="little")
    left = set(np.flatnonzero(bits).tolist()) - banned
    if allowed is not None:
        left &= set(allowed)
    if not left:
        names = ["allowed_token_ids"] if allowed is not None else []
        names += ["bad_words"] if banned else []
        raise ValueError(
            f"structured_outputs has no first token that {' and '.join(names)} allows; allow the "
            "tokens that its grammar needs, or remove one of these settings"
        )


def _check_prompt(
    prompt: list[int], config: EngineConfig, max_total_tokens: int, capacity: str
) -> None:
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    no_room = f"the prompt has {len(prompt)} tokens, which leaves no room for an answer in"
    if len(prompt) >= config.max_model_len:
        raise ValueError(
            f"{no_room} max_model_len={config.max_model_len}; shorten it or raise max_model_len"
        )
    if len(prompt) >= max_total_tokens:
        raise ValueError(
            f"{no_room} the KV cache ({capacity} tokens); raise num_kv_blocks or "
            "gpu_memory_utilization"
        )
    vocab_size = config.model_config.vocab_size
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"the prompt holds token id {token_id}, outside the vocabulary of {vocab_size} "
                "tokens; encode the text with this model's tokenizer"
            )


def _check_lists(request: AddRequest, config: EngineConfig) -> None:
    """Check the token ids of a request, and that its lists fit into a step's plan."""
    params, vocab_size = request.sampling_params, config.model_config.vocab_size
    lists = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": tuple(params.logit_bias or ()),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words": tuple(id_ for word in request.bad_word_ids for id_ in word),
    }
    for name, ids in lists.items():
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} holds {token_id}, outside the vocabulary of {vocab_size} tokens; "
                    "leave it out"
                )
    if (params.bad_words and not request.bad_word_ids) or not all(request.bad_word_ids):
        raise ValueError(
            f"bad_words={list(params.bad_words)} needs a tokenizer, and this engine has none; name "
            "one with tokenizer=, or leave bad_words out"
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocab_size:
            raise ValueError(
                f"{name}={getattr(params, name)} is more than the {vocab_size} tokens of the "
                "vocabulary; lower it"
            )
    num_words = sum(map(len, lists.values())) + len(lists["logit_bias"]) + len(request.bad_word_ids)
    # a row's lists also hold the model's end tokens
    max_words = config.plan_limits.max_list_words - len(config.model_config.eos_token_ids)
    if num_words > max_words:
        raise ValueError(
            f"{max(lists, key=lambda name: len(lists[name]))} and the other lists of token ids "
            f"take {num_words} words together, and a request may have {max_words}; shorten them"
        )


def _check_allowed_tokens(request: AddRequest, eos_token_ids: tuple[int, ...]) -> None:
    """Check that other settings leave an allowed first token."""
    params, excluded = request.sampling_params, _banned_tokens(request)
    names = ["bad_words"] if excluded else []
    if params.min_tokens > 0:
        names.append(f"min_tokens={params.min_tokens}")
        excluded.update(params.stop_token_ids, () if params.ignore_eos else eos_token_ids)
    allowed = params.allowed_token_ids or ()
    if excluded.issuperset(allowed):
        raise ValueError(
            f"allowed_token_ids={short(list(allowed))} leaves no token to sample, because "
            f"{' and '.join(names)} excludes these; allow another token, or remove one of "
            "these settings"
        )


def _banned_tokens(request: AddRequest) -> set[int]:
    """Return the bad words that are a single token."""
    return {word[0] for word in request.bad_word_ids if len(word) == 1}
