"""Check the prompts and sampling parameters of `LLM.generate`, and normalize them to lists."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from tpllm.checks import are_ints, short
from tpllm.sampling_params import SamplingParams
from tpllm.vllm_keywords import PROMPTS, refuse_missing

Prompt = str | Sequence[int] | Mapping[str, Any]

_FORMATS = 'a string, a list of token ids, {"prompt": string} or {"prompt_token_ids": ids}'


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[str | list[int]]:
    """Return one or many prompts as a list of strings and token ids. A list of ids is one prompt.

    Raises:
        ValueError: a prompt has another type; the message has its index.
    """
    if isinstance(prompts, str | Mapping):
        return [_text_or_ids(0, prompts)]
    items = plain_list(prompts)
    if items is None:
        raise ValueError(f"prompts={short(prompts)} must be {_FORMATS}, or a list of these")
    if items and isinstance(items[0], Integral):
        return [_text_or_ids(0, items)]
    return [_text_or_ids(i, item) for i, item in enumerate(items)]


def one_for_each(
    params: SamplingParams | Iterable[SamplingParams] | None,
    num_prompts: int,
    make_default: Callable[[], SamplingParams] = SamplingParams,
) -> list[SamplingParams]:
    """Return sampling parameters for each prompt, from one for all, one for each, or None.

    Raises:
        ValueError: their number is not `num_prompts`, or one is not SamplingParams.
    """
    if params is None:
        params = make_default()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    each = plain_list(params)
    if each is None:
        raise ValueError(f"sampling_params={short(params)} must be SamplingParams, or a list")
    if len(each) != num_prompts:
        raise ValueError(
            f"sampling_params is a list of {len(each)} for {num_prompts} prompts; "
            "give one for all, or one for each"
        )
    for item in each:
        if not isinstance(item, SamplingParams):
            raise ValueError(f"sampling_params holds {short(item)}; give SamplingParams objects")
    return each


def _text_or_ids(index: int, prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        refuse_missing(f"prompt {index}", prompt, PROMPTS)
        for key, value in prompt.items():
            known = key in ("prompt", "prompt_token_ids") or key in PROMPTS
            if not known and value is not None:
                raise ValueError(f"prompt {index} has an unknown {short(key)}; give {_FORMATS}")
        if prompt.get("prompt_token_ids") is not None:
            prompt = prompt["prompt_token_ids"]
            if isinstance(prompt, str):
                raise ValueError(
                    f"prompt {index}: prompt_token_ids={short(prompt)} must be a list of token ids"
                )
        elif isinstance(prompt.get("prompt"), str):
            prompt = prompt["prompt"]
        else:
            raise ValueError(f"prompt {index} is {short(prompt)}; give {_FORMATS}")
    if isinstance(prompt, str):
        return prompt
    ids = plain_list(prompt)
    if ids is None:
        raise ValueError(f"prompt {index} is {short(prompt)}; give {_FORMATS}")
    if are_ints(ids):  # the usual case
        return ids
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise ValueError(f"prompt {index} holds {short(token_id)}, which is not a token id")
    return [int(token_id) for token_id in ids]


def plain_list(value: Any) -> list[Any] | None:
    """Return the items of an ordered iterable, a generator or an array; None for other types."""
    if hasattr(value, "tolist"):  # numpy and torch: Python's own numbers come out
        items = value.tolist()
        return items if isinstance(items, list) else None
    if isinstance(value, str | bytes | bytearray | Mapping | set | frozenset):
        return None
    return list(value) if isinstance(value, Iterable) else None
