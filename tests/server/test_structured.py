"""From a request's fields to the form that the engine is asked for, and what that lets pass."""

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.server.conftest import Served
from tests.server.test_chat import CALL, HELLO, TOOLS, ask
from tpllm import StructuredOutputsParams
from tpllm.config import EngineConfig
from tpllm.engine.grammars import Grammars, fill_masks

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
FIELDS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        {"json": SCHEMA},
    ),
    ({"extra_body": {"guided_json": SCHEMA}}, {"json": SCHEMA}),
    ({"extra_body": {"guided_json": json.dumps(SCHEMA)}}, {"json": SCHEMA}),
    ({"extra_body": {"guided_regex": "a+"}}, {"regex": "a+"}),
    ({"extra_body": {"guided_choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"extra_body": {"guided_grammar": "start: /a/"}}, {"grammar": "start: /a/"}),
    ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, {"regex": "a+"}),
    ({"tools": TOOLS, "tool_choice": "auto"}, None),
    ({"tools": TOOLS, "tool_choice": "none"}, None),
]


@pytest.mark.parametrize("fields, form", FIELDS)
def test_fields_become_the_form_that_they_name(
    client: OpenAI, served: Served, fields: dict[str, Any], form: dict[str, Any] | None
) -> None:
    ask(client, **fields)
    (_, params) = served.engine.seen[0]
    assert params.structured_outputs == (None if form is None else StructuredOutputsParams(**form))


def test_completions_take_them_too(client: OpenAI, served: Served) -> None:
    extra = {"guided_choice": ["a"]}
    client.completions.create(model="letters", prompt="x", extra_body=extra)
    assert served.engine.seen[0][1].structured_outputs == StructuredOutputsParams(choice=["a"])


def test_an_answer_with_a_form_holds_no_reasoning(client: OpenAI, served: Served) -> None:
    served.engine.reply = '{"a": 1}'
    served.engine.tokenizer.template_end = "<think>\n"
    message = ask(client, response_format={"type": "json_object"}).choices[0].message
    assert message.content == '{"a": 1}'


OTHER = {
    "type": "function",
    "function": {
        "name": 'über "it"',
        "parameters": {
            "$defs": {"n": {"enum": [1, 2]}},
            "properties": {"n": {"$ref": "#/$defs/n"}},
        },
    },
}
OTHER_CALL = '<tool_call>\n{"name": "über \\"it\\"", "arguments": {"n": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    "fields, fitting, others",
    [
        (
            {"tool_choice": "required"},
            [CALL, OTHER_CALL, f"{OTHER_CALL}\n{CALL}"],
            ["weather", "", CALL.replace('Ulm"', 'Ulm", 3'), OTHER_CALL.replace("2", "3")],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{CALL}"]),
        ({"tool_choice": NAMED}, [CALL], [OTHER_CALL, f"{CALL}\n{CALL}"]),
    ],
)
def test_a_required_call_has_the_form_of_a_tool(
    client: OpenAI,
    served: Served,
    fields: dict[str, Any],
    fitting: list[str],
    others: list[str],
) -> None:
    ask(client, messages=HELLO, tools=[*TOOLS, OTHER], **fields)
    form = served.engine.seen[0][1].structured_outputs
    grammar = Grammars.of_engine(EngineConfig.resolve(device="cpu")).compile(form)

    def fits(text: str) -> bool:
        matcher = grammar.start()
        if not all(matcher.advance(id_) for id_ in grammar._tokenizer.tokenize_str(text)):
            return False
        (row,) = fill_masks([matcher], [()], 128)
        return all((row[id_ >> 5] >> (id_ & 31)) & 1 for id_ in grammar.end_token_ids)

    assert [text for text in fitting if not fits(text)] == []
    assert [text for text in others if fits(text)] == []
