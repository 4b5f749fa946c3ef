"""Keywords of vLLM that do not exist here: some values pass, others say what to do."""

import asyncio
import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest

from tpllm import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from tpllm.config.settings import Settings
from tpllm.errors import UnknownSettingError
from tpllm.vllm_keywords import CALLS, SAMPLING, SETTINGS, STRUCTURED, Missing, without_missing

pytestmark = pytest.mark.usefixtures("forked_engines")

# without types: a type checker would refuse the keywords
make_params: Any = SamplingParams
make_llm: Any = LLM
make_async: Any = AsyncLLM
make_settings: Any = Settings
make_beams: Any = BeamSearchParams

SURFACES: dict[str, tuple[dict[str, Missing], Callable[..., Any]]] = {
    "settings": (dict(SETTINGS), Settings),
    "sampling": (dict(SAMPLING), SamplingParams),
    "structured": (dict(STRUCTURED), lambda **given: StructuredOutputsParams(regex="a", **given)),
}


@pytest.mark.parametrize("surface", SURFACES)
def test_values_without_effect_are_ignored(surface):
    table, make = SURFACES[surface]
    for name, missing in table.items():
        for value in (None, *missing.ignored):
            assert make(**{name: value}) == make()


@pytest.mark.parametrize("surface", SURFACES)
def test_an_error_about_another_value_says_what_to_use_instead(surface):
    table, make = SURFACES[surface]
    for name, missing in table.items():
        with pytest.raises(UnknownSettingError) as raised:
            make(**{name: "something else"})
        message = f"{name}='something else' is absent in tpllm; {missing.instead}"
        assert str(raised.value).endswith(message)


@pytest.mark.parametrize("kind", [TypeError, ValueError])
@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: make_llm(quantization="awq"),
            r"^LLM: quantization='awq' is absent in tpllm; use a checkpoint in bfloat16",
        ),
        (lambda: make_async(swap_space=16), r"^LLM: swap_space=16 is absent in tpllm; a preempted"),
        (
            lambda: make_llm(trust_remote_code=True),
            "no code of a checkpoint is ever run.*leave it out",
        ),
        (lambda: make_llm(block_size=16), "block_size=16 is absent in tpllm; use kv_block_size"),
        (lambda: make_params(length_penalty=2.0), "length_penalty=2.0 is absent .*beam_search"),
        (lambda: make_params(use_beam_search=True), "call LLM.beam_search"),
        (lambda: make_params(best_of=True), "best_of=True is absent in tpllm; use n"),
        (lambda: make_params(temperatur=1), "no setting 'temperatur'; did you mean 'temperat"),
        (lambda: make_llm(zzzz=1), "^LLM has no setting 'zzzz'; it has "),
    ],
)
def test_both_kinds_of_errors_catch_them(make, message, kind):
    with pytest.raises(kind, match=message):
        make()


def test_numbers_may_be_of_either_type():
    assert make_params(length_penalty=1, best_of=1.0) == SamplingParams()
    assert make_settings(swap_space=4.0, cpu_offload_gb=0.0) == Settings()


def test_nothing_that_exists_is_called_absent():
    for kind, table in (
        (Settings, SETTINGS),
        (SamplingParams, SAMPLING),
        (StructuredOutputsParams, STRUCTURED),
    ):
        assert not {field.name for field in fields(kind)} & table.keys()
    for method in (LLM.generate, LLM.chat, LLM.beam_search, AsyncLLM.generate):
        assert not inspect.signature(method).parameters.keys() & CALLS.keys()


def test_an_unknown_keyword_of_a_call_names_the_known_ones(llm):
    message = r"LLM.generate has no setting 'x'; it has prompts, sampling_params, use_tqdm$"
    with pytest.raises(UnknownSettingError, match=message):
        llm.generate("Genesis", x=1)


def test_parameters_are_copied_replaced_pickled_and_shown_as_before():
    params = make_params(temperature=0.5, seed=3, use_beam_search=False)
    assert replace(params, seed=None) == make_params(temperature=0.5)
    assert copy.copy(params) == pickle.loads(pickle.dumps(params)) == params
    assert "seed" in inspect.signature(SamplingParams).parameters
    with pytest.raises(UnknownSettingError, match="BeamSearchParams has no setting 'beam_with'"):
        make_beams(beam_with=2, max_tokens=3)


@pytest.fixture(scope="module")
def llm(forked_engines: None) -> Iterator[LLM]:
    with make_llm(device="cpu", num_kv_blocks=40, swap_space=4) as llm:
        yield llm


GREEDY = make_params(temperature=0, max_tokens=4)


def test_calls_ignore_values_without_effect(llm):
    def texts(**given: Any) -> list[str]:
        asked = [{"role": "user", "content": "What is 348 + 44?"}]
        search = BeamSearchParams(beam_width=2, max_tokens=2)
        return [
            llm.generate("Genesis", GREEDY, use_tqdm=False, **given)[0].outputs[0].text,
            llm.chat(asked, GREEDY, use_tqdm=False, **given)[0].outputs[0].text,
            llm.beam_search("Genesis", search, **given)[0].sequences[0].text,
        ]

    ignored = {name: each.ignored[0] for name, each in CALLS.items() if each.ignored}
    assert texts(**ignored) == texts(**dict.fromkeys(CALLS)) == texts()


def test_calls_refuse_values_that_would_have_an_effect(llm):
    for call in (llm.generate, llm.chat):
        with pytest.raises(UnknownSettingError, match="lora_request=1 is absent in tpllm; merge"):
            call("Genesis", lora_request=1)
    with pytest.raises(ValueError, match=r"prompt_token_ids=\[1\] is absent in tpllm; give the id"):
        llm.generate(prompts=None, prompt_token_ids=[1])
    with pytest.raises(TypeError, match="LLM.generate has no setting 'use_tdqm'; did you mean 'us"):
        llm.generate("Genesis", GREEDY, use_tdqm=False)


def test_a_call_of_async_llm_is_checked_likewise():
    async def first(**given: Any) -> None:
        await anext(AsyncLLM.generate(None, "a", **given))  # type: ignore[arg-type]

    with pytest.raises(UnknownSettingError, match="AsyncLLM.generate: priority=2 is absent"):
        asyncio.run(first(priority=2))
    with pytest.raises(AttributeError, match="get_default_sampling_params"):  # it goes on
        asyncio.run(first(priority=0, lora_request=None))


def test_generators_and_other_iterables_are_prompts_parameters_and_messages(llm):
    texts = ["Genesis 1", "Psalms 23"]
    right = [o.outputs[0].text for o in llm.generate(texts, GREEDY, use_tqdm=False)]
    for prompts in (
        (each for each in texts),
        map(str, texts),
        tuple(texts),
        dict.fromkeys(texts),
        {1: texts[0], 2: texts[1]}.values(),
    ):
        given = prompts.keys() if isinstance(prompts, dict) else prompts
        params = (GREEDY for _ in texts)
        outputs = llm.generate(given, params, use_tqdm=False)
        assert [output.outputs[0].text for output in outputs] == right
    question = {"role": "user", "content": "What is 348 + 44?"}
    [right_answer] = llm.chat([question], GREEDY, use_tqdm=False)
    for messages in (iter([question]), (question,), iter([iter([question])]), [(question,)]):
        [answer] = llm.chat(messages, GREEDY, use_tqdm=False)
        assert answer.outputs[0].text == right_answer.outputs[0].text


def test_unknown_names_come_before_absent_ones():
    with pytest.raises(UnknownSettingError, match="f has no setting 'sed'"):
        without_missing("f", {"lora_request": 1, "sed": 2}, CALLS, ["seed"])
