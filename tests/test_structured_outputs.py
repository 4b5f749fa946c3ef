"""StructuredOutputsParams: what is refused before anything is compiled."""

import json
from typing import Any

import pytest

from tpllm import SamplingParams, StructuredOutputsParams, UnknownSettingError
from tpllm.engine.request import AddRequest
from tpllm.supervision import messages

SCHEMA = {"type": "object", "properties": {"price": {"multipleOf": 0.01}}}

REFUSED: dict[str, dict[str, Any]] = {
    "exactly one of json, regex, choice, grammar, json_object, and has none": {},
    "has json and regex": {"json": SCHEMA, "regex": "a"},
    "json_object=False is no constraint": {"json_object": False},
    "json_object='yes' must be True or False": {"json_object": "yes"},
    "json is not a JSON schema: Expecting": {"json": '{"type":'},
    "is not JSON serializable": {"json": {"type": object}},
    "must be a JSON schema, which is an object": {"json": "[1]"},
    "json is not a JSON schema: .*InvalidOperation": {
        "json": '{"multipleOf": 1e99999999999999999999}'
    },
    "json is nested too deeply": {"json": '{"items":' * 100_000},
    "json has 1000+.* characters": {"json": {"enum": ["x" * 100_000]}},
    "regex='' must be a string": {"regex": ""},
    "regex=3 must be a string": {"regex": 3},
    "regex has 100001 characters, more than the 100000": {"regex": "a" * 100_001},
    "grammar has 1001 rules": {
        "grammar": "start: r0\n" + "".join(f"r{i}: r{i}\n" for i in range(1000))
    },
    "grammar has 1002 rules": {
        "grammar": "".join(f"r{i}: r{i}\n" for i in range(1001))
        + 'start: %json {"const": "::=::="}'
    },
    "grammar has 1003 rules": {
        "grammar": "".join(f"r{i}: r{i}\n" for i in range(1002))
        + 'start: %json {"const": "%json 1"}'
    },
    "json has 1001 rules or references": {"json": {"allOf": [{"$ref": "#"}] * 1001}},
    "%json in grammar has 1001 rules": {
        "grammar": "start: %json " + '{"allOf": [' + ", ".join(['{"$r\\u0065f" : 0}'] * 1001) + "]}"
    },
    "%json in grammar is not a JSON schema": {"grammar": "start: %json x"},
    "%json in grammar has multipleOf 10000019": {
        "grammar": 'start: "a" %json {"items": {"multipl\\u0065Of": 10000019}}'
    },
    "grammar holds a lone surrogate": {"grammar": 'root ::= "\ud800"'},
    "choice='yes' must be a list": {"choice": "yes"},
    r"choice=\[\] allows no answer": {"choice": []},
    r"choice\[1\]=''": {"choice": ["a", ""]},
    r"choice\[0\]=1 must be a string": {"choice": [1]},
    "choice has 110000 characters": {"choice": [f"{i:011}" for i in range(10_000)]},
    "whitespace_pattern needs json": {"regex": "a", "whitespace_pattern": " "},
    "disable_any_whitespace needs json": {"choice": ["a"], "disable_any_whitespace": True},
    "contradicts whitespace_pattern": {
        "json_object": True,
        "disable_any_whitespace": True,
        "whitespace_pattern": " ",
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_form_that_is_none_is_refused(message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**REFUSED[message])


@pytest.mark.parametrize(
    "numbers", [[10000019], [9973, 9967], [0.001, 7919], ["1e999999"], [0.123456789]]
)
def test_a_multiple_that_would_be_compiled_for_ever_is_refused(numbers):
    parts = ", ".join(f'{{"multipleOf": {number}}}' for number in numbers)
    with pytest.raises(ValueError, match="multipleOf.* (at most 65535|out of the range)"):
        StructuredOutputsParams(json=f'{{"anyOf": [{parts}]}}')


@pytest.mark.parametrize("numbers", [[0.01, 100], [2, 3, 5, 7, 11], [1000, 250, 0.5], [-4]])
def test_ordinary_multiples_are_let_pass(numbers):
    StructuredOutputsParams(json={"anyOf": [{"multipleOf": number} for number in numbers]})


def test_an_unknown_keyword_is_refused_with_the_nearest():
    with pytest.raises(UnknownSettingError, match="did you mean 'regex'"):
        StructuredOutputsParams(regexp="a")  # type: ignore[call-arg]


def test_sampling_params_take_nothing_else():
    with pytest.raises(ValueError, match="structured_outputs={'regex': 'a'} must be a Structured"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_a_schema_is_kept_as_text_and_choices_once_each():
    assert json.loads(str(StructuredOutputsParams(json=SCHEMA).json)) == SCHEMA
    assert StructuredOutputsParams(choice=["a", "b", "a"]).choice == ("a", "b")
    assert hash(SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMA)))


@pytest.mark.parametrize(
    "form",
    [
        {"json": SCHEMA, "whitespace_pattern": " ?"},
        {"json_object": True, "disable_any_whitespace": True},
        {"choice": ["a", "b"]},
    ],
)
def test_a_form_crosses_to_the_engine_as_plain_data(form):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form), top_k=3)
    message = json.loads(json.dumps(messages.add([AddRequest("0", [1], params)])))
    (request,) = messages.read_add(message)
    assert request.sampling_params == params
