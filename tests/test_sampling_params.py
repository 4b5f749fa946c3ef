import pickle
from typing import Any

import numpy as np
import pytest

from tpllm import RequestOutputKind
from tpllm.errors import UnknownSettingError
from tpllm.sampling_params import SamplingParams

DEFAULTS_OF_VLLM = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "bad_words": (),
    "logit_bias": None,
    "allowed_token_ids": None,
    "max_tokens": 16,
    "min_tokens": 0,
    "ignore_eos": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "structured_outputs": None,
}


def test_defaults_are_those_of_vllm():
    assert vars(SamplingParams()) == DEFAULTS_OF_VLLM


def test_every_setting_is_documented():
    for name in DEFAULTS_OF_VLLM:
        assert f"        {name}: " in str(SamplingParams.__doc__)


def test_one_stop_text_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == SamplingParams(stop=["END"]).stop == ("END",)


def test_none_stands_for_an_empty_list():
    none: Any = None
    params = SamplingParams(stop=none, stop_token_ids=none, bad_words=none)
    assert params == SamplingParams()


def test_a_logit_bias_is_cut_to_the_range_of_openai_and_takes_the_keys_of_json():
    given: Any = {"7": 1000, 8: np.float32(-1000), 9: 0.5}
    params = SamplingParams(logit_bias=given)
    assert params.logit_bias == {7: 100.0, 8: -100.0, 9: 0.5}


def test_allowed_token_ids_are_kept_once_each():
    assert SamplingParams(allowed_token_ids=[5, 3, 5]).allowed_token_ids == (5, 3)


def test_seed_minus_one_is_no_seed():
    assert SamplingParams(seed=-1).seed is None


def test_what_a_dict_held_later_changes_nothing():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}


def test_numpy_numbers_become_python_numbers():
    given: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "max_tokens": np.int64(3),
        "stop_token_ids": np.array([1, 2]),
    }
    params = SamplingParams(**given)
    assert params == SamplingParams(temperature=0.5, max_tokens=3, stop_token_ids=[1, 2])
    assert type(params.temperature) is float
    assert type(params.max_tokens) is int
    assert type(params.stop_token_ids[0]) is int


def test_max_tokens_none_leaves_min_tokens_unbounded():
    assert SamplingParams(max_tokens=None, min_tokens=1000).max_tokens is None


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**63)])
def test_a_seed_is_any_64_bit_integer(seed):
    assert SamplingParams(seed=seed).seed == seed


def test_params_are_hashable_frozen_and_survive_pickling():
    params = SamplingParams(stop_token_ids=[7], logit_bias={3: 1.0}, seed=1)
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))
    with pytest.raises(AttributeError):
        params.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("temperature", -0.1, "temperature=-0.1 must be between 0"),
        ("temperature", float("nan"), "temperature=nan must be finite"),
        ("temperature", float("inf"), "temperature=inf must be finite"),
        ("temperature", 10**400, "temperature=10{76}\\.\\.\\. must be a number"),
        ("temperature", 1e30, "must be between 0"),
        ("temperature", True, "temperature=True must be a number"),
        ("temperature", "0.5", "temperature='0.5' must be a number"),
        ("temperature", None, "temperature=None must be a number"),
        ("max_tokens", 0, "max_tokens=0 must be at least 1"),
        ("max_tokens", 2**40, "max_tokens=1099511627776 must be at most 2147483647"),
        ("max_tokens", True, "max_tokens=True must be a whole number"),
        ("max_tokens", 1.5, "max_tokens=1.5 must be a whole number"),
        ("min_tokens", -1, "min_tokens=-1 must be at least 0"),
        ("min_tokens", 17, "min_tokens=17 is more than max_tokens=16"),
        ("ignore_eos", 1, "ignore_eos=1 must be True or False"),
        ("stop_token_ids", 5, "stop_token_ids=5 must be a list"),
        ("stop_token_ids", "5", "stop_token_ids='5' must be a list"),
        ("stop_token_ids", [1, -1], r"stop_token_ids\[1\]=-1 must be at least 0"),
        ("stop_token_ids", [True], r"stop_token_ids\[0\]=True must be a whole number"),
        ("n", 0, "n=0 must be at least 1"),
        ("n", 10**6, "n=1000000 must be at most 16384"),
        ("top_p", 0, "top_p=0 must be above 0 and at most 1"),
        ("top_p", 1.1, "top_p=1.1 must be above 0 and at most 1"),
        ("top_p", float("nan"), "top_p=nan must be finite"),
        ("top_k", -2, "top_k=-2 must be at least -1"),
        ("top_k", 2.0, "top_k=2.0 must be a whole number"),
        ("min_p", -0.1, "min_p=-0.1 must be between 0 and 1"),
        ("min_p", 1.1, "min_p=1.1 must be between 0 and 1"),
        ("presence_penalty", 2.1, "presence_penalty=2.1 must be between -2 and 2"),
        ("frequency_penalty", -2.1, "frequency_penalty=-2.1 must be between -2 and 2"),
        ("repetition_penalty", 0, "repetition_penalty=0 must be above 0"),
        ("repetition_penalty", -1, "repetition_penalty=-1 must be above 0"),
        ("stop", ["a", ""], r"stop\[1\]='' is empty, and matches everywhere"),
        ("stop", "\ud800", r"stop\[0\]='.ud800' is not valid Unicode"),
        ("bad_words", ["a", "\ud800"], r"bad_words\[1\]='.ud800' is not valid Unicode"),
        ("stop", 5, "stop=5 must be a list of strings"),
        ("stop", [5], r"stop\[0\]=5 must be a string"),
        ("bad_words", "word", "bad_words='word' must be a list of strings"),
        ("bad_words", [""], r"bad_words\[0\]='' is empty"),
        ("logit_bias", [1], r"logit_bias=\[1\] must be a dict"),
        ("logit_bias", {"x": 1}, "logit_bias key='x' must be a whole number"),
        ("logit_bias", {-1: 1}, "logit_bias key=-1 must be at least 0"),
        ("logit_bias", {5: "high"}, r"logit_bias\[5\]='high' must be a number"),
        ("allowed_token_ids", [], "allowed_token_ids=\\[\\] allows no token"),
        ("allowed_token_ids", [-1], r"allowed_token_ids\[0\]=-1 must be at least 0"),
        ("logprobs", -1, "logprobs=-1, the whole vocabulary, is not supported; ask for at most 20"),
        ("logprobs", 21, "logprobs=21 must be at most 20"),
        ("logprobs", True, "logprobs=True must be a whole number"),
        ("prompt_logprobs", -2, "prompt_logprobs=-2 must be at least 0"),
        ("prompt_logprobs", 21, "prompt_logprobs=21 must be at most 20"),
        ("detokenize", 0, "detokenize=0 must be True or False"),
        ("skip_special_tokens", None, "skip_special_tokens=None must be True or False"),
        ("spaces_between_special_tokens", 1, "=1 must be True or False"),
        ("include_stop_str_in_output", "yes", "='yes' must be True or False"),
        ("output_kind", "DELTA", "must be a RequestOutputKind: CUMULATIVE, DELTA, FINAL_ONLY"),
        ("seed", 2**64, "must be at most 18446744073709551615"),
        ("seed", -(2**63) - 1, "must be at least -9223372036854775808"),
        ("seed", 0.0, "seed=0.0 must be a whole number"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{setting: value})


def test_greedy_continuations_of_one_prompt_would_all_be_the_same():
    with pytest.raises(ValueError, match="n=2 with temperature=0 would give the same"):
        SamplingParams(n=2, temperature=0)


def test_stop_texts_need_a_text():
    with pytest.raises(ValueError, match=r"stop=\['END'\] needs the text"):
        SamplingParams(stop="END", detokenize=False)


def test_an_unknown_keyword_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownSettingError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]
