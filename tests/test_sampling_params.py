import pickle
from typing import Any

import numpy as np
import pytest

from tpllm.errors import UnknownSettingError
from tpllm.sampling_params import SamplingParams


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.min_tokens) == (1.0, 16, 0)
    assert (params.ignore_eos, params.stop_token_ids, params.seed) == (False, (), None)


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
    params = SamplingParams(stop_token_ids=[7], seed=1)
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))
    with pytest.raises(AttributeError):
        params.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("temperature", -0.1, "temperature=-0.1 must be between 0"),
        ("temperature", float("nan"), "temperature=nan must be finite"),
        ("temperature", float("inf"), "temperature=inf must be finite"),
        ("temperature", 10**400, "temperature=inf must be finite"),
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
        ("seed", 2**64, "must be at most 18446744073709551615"),
        ("seed", -(2**63) - 1, "must be at least -9223372036854775808"),
        ("seed", 0.0, "seed=0.0 must be a whole number"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{setting: value})


def test_an_unknown_keyword_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownSettingError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]
