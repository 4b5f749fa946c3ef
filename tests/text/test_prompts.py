"""Prompts in every format: accepted ones and refused ones."""

import numpy as np
import pytest
import torch

from tpllm import SamplingParams
from tpllm.text.prompts import as_list, one_for_each


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([], []),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ([[5], "a", {"prompt": "b"}, {"prompt_token_ids": [8]}], [[5], "a", "b", [8]]),
        ({"prompt_token_ids": (5, 6)}, [[5, 6]]),
        (np.array([5, 6]), [[5, 6]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        ([np.int64(5), np.int32(6)], [[5, 6]]),
        ((id_ for id_ in (5, 6)), [[5, 6]]),
        (map(str, "ab"), ["a", "b"]),
        ([iter([5, 6]), range(2)], [[5, 6], [0, 1]]),
        ({"a": 1, "b": 2}.keys(), ["a", "b"]),
        ({"prompt": "a", "prompt_token_ids": None, "multi_modal_data": None}, ["a"]),
        ({"type": "text", "prompt": "a", "multi_modal_data": {}, "cache_salt": ""}, ["a"]),
        ([[]], [[]]),  # an empty prompt is the engine's to refuse
    ],
)
def test_every_format_becomes_a_text_or_plain_ids(prompts, expected):
    result = as_list(prompts)
    assert result == expected
    assert all(
        type(id_) is int
        for prompt in result
        if prompt not in ("hi",)
        for id_ in prompt
        if not isinstance(prompt, str)
    )


@pytest.mark.parametrize(
    "prompts, message",
    [
        (None, "prompts=None must be a string"),
        (5, "prompts=5 must be a string"),
        (b"abc", "must be a string"),
        ([b"abc"], "prompt 0 is b'abc'; give a string"),
        (["a", None], "prompt 1 is None"),
        ([["a"]], "prompt 0 holds 'a', which is not a token id"),
        ([1, 2.5], "prompt 0 holds 2.5"),
        ([True, 2], "prompt 0 holds True"),
        ({"text": "a"}, "prompt 0 has an unknown 'text'; give"),
        (
            {"prompt": "a", "multi_modal_data": {"image": 1}},
            "prompt 0: multi_modal_data={'image': 1} is absent in tpllm; models read text alone",
        ),
        ({"prompt": "a", "cache_salt": "x"}, "cache_salt='x' is absent.*enable_prefix_caching"),
        ([{"role": "user", "content": "a"}], "role='user' is absent in tpllm; call LLM.chat"),
        ({"prompt": 5}, "prompt 0 is {'prompt': 5}; give"),
        ({"prompt_token_ids": "hello"}, "prompt_token_ids='hello' must be a list of token ids"),
        ({1: 2, "a": 3}, "prompt 0 has an unknown 1"),
        ({}, "prompt 0 is {}; give"),
        (torch.tensor(5), "must be a string"),
        ({"a", "b"}, "must be a string"),  # in no order
        ({"prompt_token_ids": None}, "prompt 0 is {'prompt_token_ids': None}; give"),
    ],
)
def test_other_formats_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        as_list(prompts)


def test_params_are_one_for_all_one_for_each_or_none():
    one, other = SamplingParams(seed=1), SamplingParams(seed=2)
    assert one_for_each(None, 2) == [SamplingParams()] * 2
    assert one_for_each(one, 2) == [one, one]
    assert one_for_each((one, other), 2) == [one, other]


@pytest.mark.parametrize(
    "params, message",
    [
        ([SamplingParams()] * 3, "a list of 3 for 2 prompts; give one for all"),
        ([], "a list of 0 for 2 prompts"),
        (5, "sampling_params=5 must be SamplingParams"),
        ({"temperature": 0}, "must be SamplingParams"),
        ([SamplingParams(), None], "sampling_params holds None"),
    ],
)
def test_other_params_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        one_for_each(params, 2)
