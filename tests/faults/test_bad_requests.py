"""Tests that any request is served or refused, and harms no other request.

The engine is the real one except for its worker, which makes tokens without a model.
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.soak_worker import continuation
from tpllm import LLM, SamplingParams
from tpllm import llm as llm_module
from tpllm.supervision.start import start_engine

GOOD = [5, 6, 7]
FEW = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
quickly = partial(
    settings,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def quiet_run(prompt: list[int], count: int = 3) -> list[int]:
    return list(islice(continuation(prompt, 4096), count))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            llm_module, "start_engine", partial(start_engine, module="launch.soak_worker")
        )
        with LLM(device="cpu", num_kv_blocks=2000, max_model_len=512) as llm:
            yield llm


def assert_serves(llm: LLM) -> None:
    assert llm._coordinator.num_unfinished == 0
    output = llm.generate([GOOD], FEW, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == quiet_run(GOOD)


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.sampled_from([2**63, 2**64, 10**400, np.int64(3), np.float32("nan"), np.uint8(200)]),
)
leaves = st.one_of(st.none(), numbers, st.text(max_size=12), st.binary(max_size=4))
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(
            st.sampled_from(["prompt", "prompt_token_ids", "role", "content", "x"]), inner
        ),
        st.sets(st.integers(), max_size=2),
    ),
    max_leaves=8,
)
names = st.sampled_from([field.name for field in fields(SamplingParams)])


@quickly(max_examples=200)
@given(keywords=st.dictionaries(st.one_of(names, st.text(max_size=6)), anything, max_size=4))
def test_sampling_parameters_are_taken_or_refused_with_a_value_error(keywords):
    try:
        params = SamplingParams(**keywords)
    except ValueError as error:
        assert len(str(error)) > 10
    else:
        assert hash(repr(params)) is not None


@quickly(max_examples=150)
@given(prompt=anything)
def test_a_prompt_of_any_kind_is_served_or_refused_alone(llm, prompt):
    try:
        outputs = llm.generate([GOOD, prompt], FEW, use_tqdm=False)
    except ValueError as error:
        assert "prompt" in str(error)
        assert len(str(error)) < 1000
    else:
        assert outputs[0].outputs[0].token_ids == quiet_run(GOOD)
        ids = outputs[1].prompt_token_ids
        assert outputs[1].outputs[0].token_ids == quiet_run(ids)
    assert llm._coordinator.num_unfinished == 0


@quickly(max_examples=100)
@given(messages=anything)
def test_messages_of_any_kind_are_answered_or_refused(llm, messages):
    for given_messages in (messages, [messages], [{"role": "user", "content": messages}]):
        try:
            llm.chat(given_messages, FEW, use_tqdm=False)
        except ValueError as error:
            assert str(error)
        assert llm._coordinator.num_unfinished == 0


def test_after_all_that_the_engine_still_serves(llm):
    assert_serves(llm)


def test_ten_thousand_requests_at_once_are_all_served(llm):
    prompts = [[i % 4000, i // 4000, 7] for i in range(10_000)]
    outputs = llm.generate(prompts, FEW, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == quiet_run(prompt)


def test_one_bad_request_among_many_is_named_and_none_is_started(llm):
    prompts: list[Any] = [GOOD] * 5000
    prompts[4321] = [10**9]
    steps = llm.stats().num_steps
    with pytest.raises(
        ValueError, match="prompt 4321: the prompt holds token id 1000000000, outside"
    ):
        llm.generate(prompts, FEW, use_tqdm=False)
    assert llm.stats().num_steps == steps
    assert_serves(llm)


def test_a_prompt_of_megabytes_is_refused_by_its_length(llm):
    with pytest.raises(ValueError, match="which leaves no room for an answer"):
        llm.generate(["word " * 400_000], FEW, use_tqdm=False)
    assert_serves(llm)
