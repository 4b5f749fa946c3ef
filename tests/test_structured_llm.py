"""Answers of the shipped model that have a form, at random temperatures, alone and in company."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.grammar_texts import start_trials
from tpllm import LLM, AsyncLLM, NoNextTokenError, SamplingParams, StructuredOutputsParams
from tpllm.outputs import CompletionOutput

pytestmark = pytest.mark.usefixtures("forked_engines")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,9} \d{1,3}(\.\d{2})?"
CHOICE = ["yes", "no", "per\\haps 😀"]
GRAMMAR = 'root ::= "(" root ")" | digit\ndigit ::= [0-9]'


def drawn(seed: int, form: dict[str, Any] | None, **settings: Any) -> SamplingParams:
    settings = {"temperature": 0.4 + 0.3 * seed, "max_tokens": 80, **settings}
    structured = None if form is None else StructuredOutputsParams(**form)
    return SamplingParams(seed=seed, structured_outputs=structured, **settings)


# a chain that overflows the stack of the compiler
CHAIN = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(900)}
OVERFLOW = {"$ref": "#/$defs/d0", "$defs": {**CHAIN, "d900": {"type": "null"}}}
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA, "whitespace_pattern": " ?"},
    "regex": {"regex": REGEX},
    "choice": {"choice": CHOICE},
    "grammar": {"grammar": GRAMMAR},
}
REQUESTS = [(name, drawn(seed, FORMS[name])) for name in FORMS for seed in range(3)]
REQUESTS += [
    ("json", drawn(0, FORMS["json"], temperature=0)),
    ("json", drawn(1, FORMS["json"], top_p=0.8, top_k=30, repetition_penalty=1.2, logprobs=2)),
    ("regex", drawn(2, FORMS["regex"], min_tokens=5, ignore_eos=True)),
    ("choice", drawn(3, FORMS["choice"], min_p=0.1, logit_bias={5: 10.0})),
]
PLAIN = [drawn(seed, None, max_tokens=24, ignore_eos=True) for seed in range(4)]
PLAIN.append(drawn(5, None, max_tokens=24, top_k=20, presence_penalty=0.5, ignore_eos=True))
PROMPTS = ["Once upon a time", "What is 3 + 4?"]


def check(name: str, output: CompletionOutput) -> None:
    """The answer has its form, or, where it was cut short, what is there of it."""
    text = output.text
    if name == "grammar" and output.finish_reason == "length":
        assert re.fullmatch(r"\(+\d?\)*", text)
        return
    assert output.finish_reason == "stop" and output.stop_reason is None
    if name == "json":
        value = json.loads(text)
        assert list(value) == ["name", "age", "tags"]
        assert len(value["name"]) <= 12 and 0 <= value["age"] <= 130
        assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b", "é"}
    elif name == "regex":
        assert re.fullmatch(REGEX, text)
    elif name == "choice":
        assert text in CHOICE
    else:
        assert re.fullmatch(r"(\(*)\d(\)*)", text)
        assert text.count("(") == text.count(")")


def generate(llm: LLM, params: list[SamplingParams]) -> list[CompletionOutput]:
    prompts = [PROMPTS[i % 2] for i in range(len(params))]
    return [each.outputs[0] for each in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", max_num_seqs=32) as llm:
        yield start_trials(llm)


@pytest.fixture(scope="module")
def together(llm: LLM) -> list[CompletionOutput]:
    """All requests in one batch, those without a form last."""
    return generate(llm, [params for _, params in REQUESTS] + PLAIN)


def test_every_answer_follows_its_constraint(together: list[CompletionOutput]) -> None:
    for (name, params), output in zip(REQUESTS, together, strict=False):
        check(name, output)
        if params.logprobs is not None:
            assert output.logprobs is not None
            assert len(output.logprobs) == len(output.token_ids)
    texts = [output.text for output in together]
    assert len(set(texts)) > len(texts) // 2  # they were drawn


# as pydantic writes them
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}, "on": {"type": "boolean"}},
    "required": ["x", "y", "on"],
}
NESTED = {
    "type": "object",
    "$defs": {"Point": POINT, "Color": {"enum": ["red", "blue"], "type": "string"}},
    "properties": {
        "at": {"$ref": "#/$defs/Point"},
        "color": {"$ref": "#/$defs/Color"},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}, "maxItems": 2},
    },
    "required": ["at", "color", "points"],
}
TOOL_CALL = 'start: "<tool_call>" %json ' + json.dumps(NESTED) + ' "</tool_call>"'


def test_a_weak_model_comes_to_the_end_of_its_json(llm: LLM) -> None:
    forms: list[dict[str, Any]] = [{"json": NESTED}, {"grammar": TOOL_CALL}]
    params = [
        drawn(seed, form, temperature=min(seed, 1), max_tokens=250)
        for form in forms
        for seed in range(6)
    ]
    params.append(drawn(0, {"json_object": True}, temperature=0))
    for output in generate(llm, params):
        assert output.finish_reason == "stop", output.text
        value = json.loads(output.text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert isinstance(value, dict)


def test_other_requests_change_nothing(llm: LLM, together: list[CompletionOutput]) -> None:
    num = len(REQUESTS)
    assert num % 2 == 0  # so that each has the prompt that it had in company
    apart = generate(llm, PLAIN)
    assert [each.token_ids for each in apart] == [each.token_ids for each in together[num:]]
    for i in range(0, num, 5):
        (alone,) = llm.generate([PROMPTS[i % 2]], REQUESTS[i][1], use_tqdm=False)
        assert alone.outputs[0].token_ids == together[i].token_ids


def test_two_ranks_with_a_tiny_cache_sample_the_same(together: list[CompletionOutput]) -> None:
    with LLM(
        device="cpu",
        tensor_parallel_size=2,
        num_kv_blocks=24,
        max_num_batched_tokens=24,
        max_num_seqs=24,
    ) as llm:
        outputs = generate(llm, [params for _, params in REQUESTS] + PLAIN)
        assert llm.stats().num_preemptions > 0
    assert [each.token_ids for each in outputs] == [each.token_ids for each in together]


def test_continuations_have_masks_of_their_own(llm: LLM) -> None:
    params = drawn(7, FORMS["regex"], n=6, temperature=1.5, prompt_logprobs=0)
    (output,) = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    for each in output.outputs:
        check("regex", each)
    assert len({each.text for each in output.outputs}) > 3


def test_a_stream_may_be_closed_before_its_end(llm: LLM) -> None:
    stream = llm.generate_stream(PROMPTS, drawn(1, {"regex": "a{200}"}, max_tokens=200))
    for _ in range(6):
        next(stream)
    stream.close()
    stopped = llm.generate(PROMPTS, drawn(1, {"regex": "(ab){9}"}, stop="bab"), use_tqdm=False)
    assert [each.outputs[0].text for each in stopped] == ["a", "a"]
    assert stopped[0].outputs[0].stop_reason == "bab"


def ids_of(llm: LLM, *texts: str) -> list[int]:
    each = llm.get_tokenizer().encode_batch(list(texts), add_special_tokens=False)
    return [id_ for ids in each for id_ in ids]


def contradictions(llm: LLM) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Forms and other settings that leave no token, after some tokens."""
    foo, bar, seven = ids_of(llm, "f", "o"), ids_of(llm, "b", "a", "r"), ids_of(llm, "7")
    return {
        "bad words": ({"choice": ["foo"]}, {"bad_words": ["oo", "o", "foo"]}),
        "an allow list": ({"choice": ["foobar"]}, {"allowed_token_ids": foo}),
        "both": ({"regex": "(foo|bar){3}"}, {"allowed_token_ids": foo + bar, "bad_words": ["o"]}),
        "no form": (None, {"allowed_token_ids": seven, "bad_words": ["77"]}),
        "no form, min_tokens": (
            None,
            {"allowed_token_ids": seven, "bad_words": ["77"], "min_tokens": 5},
        ),
    }


def test_settings_that_leave_no_token_at_all_are_refused_before_any_prompt_starts(
    llm: LLM,
) -> None:
    steps = llm.stats().num_steps
    form = StructuredOutputsParams(choice=["foo"])
    for settings, names in (
        ({"bad_words": ["foo", "fo", "f"]}, "bad_words"),
        ({"allowed_token_ids": ids_of(llm, "7")}, "allowed_token_ids"),
    ):
        params = SamplingParams(structured_outputs=form, **settings)
        with pytest.raises(ValueError, match=f"prompt 1: structured_outputs has no.*{names}"):
            llm.generate(PROMPTS, [PLAIN[0], params], use_tqdm=False)
    assert llm.stats().num_steps == steps


@pytest.mark.parametrize(
    "name", ["bad words", "an allow list", "both", "no form", "no form, min_tokens"]
)
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "logprobs": 2}, {"n": 3}])
def test_settings_that_leave_no_next_token_are_an_error_and_no_text(
    llm: LLM, name: str, settings: dict[str, Any]
) -> None:
    form, own = contradictions(llm)[name]
    params = drawn(1, form, **{**settings, **own})
    with pytest.raises(NoNextTokenError, match="prompt 1: .*settings leave no") as caught:
        llm.generate(["a", "b", "c"], [PLAIN[0], params, PLAIN[1]], use_tqdm=False)
    outputs = caught.value.outputs
    assert [each.prompt for each in outputs] == ["a", "c"]
    assert all(each.outputs[0].finish_reason == "length" for each in outputs)
    assert [each.prompt for each in caught.value.unfinished] == ["b"]
    assert llm._coordinator.num_unfinished == 0


def test_a_stream_gives_the_other_prompts_before_the_error(llm: LLM) -> None:
    form, own = contradictions(llm)["an allow list"]
    stream = llm.generate_stream(PROMPTS, [drawn(1, form, **own), PLAIN[0]])
    last = {}
    with pytest.raises(NoNextTokenError, match="prompt 0: "):
        for output in stream:
            last[output.prompt] = output
    assert last[PROMPTS[1]].finished
    assert all(not each.finished for prompt, each in last.items() if prompt != PROMPTS[1])


def test_reaching_max_tokens_is_no_such_error(llm: LLM) -> None:
    (output,) = generate(llm, [drawn(1, {"choice": ["foobar foobar foobar"]}, max_tokens=2)])
    assert output.finish_reason == "length" and "foobar".startswith(output.text[:6])


def test_what_cannot_be_compiled_is_refused_before_any_prompt_starts(llm: LLM) -> None:
    bad = [PLAIN[0], drawn(0, {"regex": "(a"})]
    steps = llm.stats().num_steps
    with pytest.raises(ValueError, match="prompt 1: structured_outputs: regex='\\(a' cannot be"):
        llm.generate(PROMPTS, bad, use_tqdm=False)
    assert llm.stats().num_steps == steps


def test_an_engine_in_its_own_process_compiles_aside_and_refuses(
    together: list[CompletionOutput],
) -> None:
    async def answer(engine: AsyncLLM, prompt: str, params: SamplingParams) -> CompletionOutput:
        outputs = [output async for output in engine.generate(prompt, params)]
        return outputs[-1].outputs[0]

    async def run() -> None:
        async with AsyncLLM(device="cpu", max_num_seqs=32) as engine:
            asked = [
                asyncio.create_task(answer(engine, PROMPTS[i % 2], params))
                for i, params in enumerate([params for _, params in REQUESTS] + PLAIN)
            ]
            bad = asyncio.create_task(answer(engine, "x", drawn(0, {"regex": "(a"})))
            left = engine.generate("x", drawn(0, {"regex": "a{100}"}, max_tokens=100))
            await anext(left)
            await left.aclose()
            outputs = await asyncio.gather(*asked)
            with pytest.raises(ValueError, match="regex='\\(a' cannot be used"):
                await bad
            with pytest.raises(ValueError, match="json cannot be used: the compiler crashed on it"):
                await answer(engine, "x", drawn(0, {"json": OVERFLOW}))
            ids = engine.get_tokenizer().encode_batch(["f"], add_special_tokens=False)[0]
            dry = drawn(1, {"choice": ["foobar"]}, allowed_token_ids=ids, n=2)
            with pytest.raises(NoNextTokenError, match="settings leave no next token"):
                await answer(engine, "x", dry)
        assert [each.token_ids for each in outputs] == [each.token_ids for each in together]

    asyncio.run(run())
