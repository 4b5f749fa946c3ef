"""Fields of a request become a constraint of the engine, which accepts the right answers."""

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.grammar_texts import shipped_grammars
from tests.server.conftest import Served
from tests.server.test_chat import CALL, HELLO, TOOLS, ask
from tpllm import StructuredOutputsParams
from tpllm.engine.grammars import Grammar, fill_masks
from tpllm.server.errors import APIError
from tpllm.server.protocol import ChatCompletionRequest
from tpllm.server.structured import naming_the_field, structured_outputs

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
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
    ({"response_format": {"type": "json_object", "schema": None}}, {"json_object": True}),
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
def test_each_field_becomes_its_constraint(
    client: OpenAI, served: Served, fields: dict[str, Any], form: dict[str, Any] | None
) -> None:
    ask(client, **fields)
    (_, params) = served.engine.seen[0]
    assert params.structured_outputs == (None if form is None else StructuredOutputsParams(**form))


def test_completions_have_the_same_fields(client: OpenAI, served: Served) -> None:
    extra = {"guided_choice": ["a"]}
    client.completions.create(model="fake", prompt="x", extra_body=extra)
    assert served.engine.seen[0][1].structured_outputs == StructuredOutputsParams(choice=["a"])


def test_a_structured_answer_has_no_reasoning(client: OpenAI, served: Served) -> None:
    served.engine.reply = '{"a": 1}'
    served.engine.tokenizer.template_end = "<think>\n"
    message = ask(client, response_format={"type": "json_object"}).choices[0].message
    assert message.content == '{"a": 1}'


def compiled(served: Served) -> Grammar:
    """The constraint that the engine got."""
    form = served.engine.seen[0][1].structured_outputs
    return shipped_grammars().compile(form)


def fits(grammar: Grammar, text: str) -> bool:
    """Whether the constraint accepts `text`."""
    matcher = grammar.start()
    if not all(matcher.advance(id_) for id_ in grammar._tokenizer.tokenize_str(text)):
        return False
    (row,) = fill_masks([matcher], [()], 128)
    return all((row[id_ >> 5] >> (id_ & 31)) & 1 for id_ in grammar.end_token_ids)


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
def test_a_required_call_follows_a_tools_schema(
    client: OpenAI,
    served: Served,
    fields: dict[str, Any],
    fitting: list[str],
    others: list[str],
) -> None:
    ask(client, messages=HELLO, tools=[*TOOLS, OTHER], **fields)
    grammar = compiled(served)
    assert [text for text in fitting if not fits(grammar, text)] == []
    assert [text for text in others if fits(grammar, text)] == []


def tool_named(parameters: object = None, **more: Any) -> Any:
    function = {"name": "now", **more}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def call_with(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "now", "arguments": {arguments}}}\n</tool_call>'


INNER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NO_OBJECTS = ["null", "1", '"n"', "[]", '{"n": "\n"}']


@pytest.mark.parametrize(
    "tool",
    [
        tool_named(),
        tool_named({}),
        tool_named(parameters=None, strict=True),
        tool_named({"type": "object", "properties": {}}),
        tool_named({"type": "object", "properties": {}, "required": [], "title": "Nothing"}),
        tool_named({"type": "object", "properties": {}, "additionalProperties": False}),
    ],
)
def test_a_tool_without_parameters_takes_an_empty_object(
    client: OpenAI, served: Served, tool: Any
) -> None:
    ask(client, messages=HELLO, tools=[*TOOLS, tool], tool_choice="required")
    grammar = compiled(served)
    assert fits(grammar, call_with("{}"))
    assert [each for each in ['{"a": 1}', *NO_OBJECTS] if fits(grammar, call_with(each))] == []


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": INNER["properties"], "required": ["n"]},
        {**INNER, "type": ["object", "null"]},
        {"anyOf": [INNER, {"type": "null"}]},
        {"anyOf": [{"type": "string"}, INNER]},
        {"$ref": "#/$defs/n", "$defs": {"n": INNER}},
        {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"type": "null"}, INNER]}}},
        {"allOf": [INNER]},
        {"type": "object"},
        {"type": "object", "additionalProperties": True, "properties": {}},
    ],
)
def test_arguments_are_an_object_whatever_the_schema_leaves_open(
    client: OpenAI, served: Served, parameters: dict[str, Any]
) -> None:
    ask(client, messages=HELLO, tools=[tool_named(parameters)], tool_choice="required")
    grammar = compiled(served)
    assert fits(grammar, call_with('{"n": 1}'))
    assert [each for each in NO_OBJECTS if fits(grammar, call_with(each))] == []


@pytest.mark.parametrize("kind", ["string", "array", "null", ["string", "null"], 3, "strin"])
@pytest.mark.parametrize("choice", ["auto", "required", "none"])
def test_a_function_whose_arguments_are_no_object_is_refused(
    client: OpenAI, served: Served, kind: Any, choice: Any
) -> None:
    with pytest.raises(BadRequestError) as refused:
        ask(client, tools=[*TOOLS, tool_named({"type": kind})], tool_choice=choice)
    body: Any = refused.value.body
    assert body["message"].startswith(f"tools[1].function.parameters has type {kind!r}; the arg")
    assert body["param"] == "tools[1].function.parameters"


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {
                "tools": [
                    *TOOLS,
                    tool_named({"type": "object", "properties": {"n": {"not": {}}}}),
                ],
                "tool_choice": "required",
            },
            "tools[1].function.parameters: properties.n: not is not supported; describe",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {"minLength": -1}}},
            "response_format: minLength=-1 must be a whole number",
        ),
        (
            {"response_format": {"type": "json_object", "schema": "x"}},
            "response_format of type 'json_object' needs schema, a JSON schema",
        ),
        ({"extra_body": {"guided_json": {"if": {}}}}, "guided_json: if is not supported; write"),
        (
            {"extra_body": {"structured_outputs": {"jsn": {}}}},
            "structured_outputs: has no setting 'jsn'; did you mean 'json'?",
        ),
        (
            {"extra_body": {"structured_outputs": {}}},
            "structured_outputs: must have exactly one of json, regex",
        ),
    ],
)
def test_an_error_of_a_constraint_names_the_field_that_was_sent(
    client: OpenAI, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequestError) as refused:
        ask(client, **fields)
    body: Any = refused.value.body
    assert body["message"].startswith(message)
    assert body["param"] == message.replace(" of", ":").split(":")[0]


@pytest.mark.parametrize(
    "words",
    [
        " has no token to begin with beside allowed_token_ids; allow what the form needs",
        ": the request's other settings leave no token that fits",
    ],
)
def test_a_constraint_that_leaves_no_token_is_reported_by_its_field(words: str) -> None:
    request = ChatCompletionRequest(messages=HELLO, guided_choice=["a"])
    with pytest.raises(APIError) as refused, naming_the_field(request):
        raise ValueError(f"structured_outputs{words}")
    assert (refused.value.message, refused.value.param) == (
        f"guided_choice{words}",
        "guided_choice",
    )


def test_a_schema_with_a_wrong_keyword_is_blamed_on_its_tool() -> None:
    wrong = tool_named({"type": "object", "properties": {"n": {"type": "strin"}}})
    request = ChatCompletionRequest(messages=HELLO, tools=[*TOOLS, wrong], tool_choice="required")
    with pytest.raises(APIError, match=r"properties\.n\.type='strin' must be one of") as refused:
        structured_outputs(request)
    assert refused.value.param == "tools[1].function.parameters"


def test_a_schema_that_cannot_be_compiled_is_blamed_on_its_tool(
    client: OpenAI, served: Served
) -> None:
    wrong = tool_named({"type": "object", "properties": {"n": {"type": "string", "pattern": "("}}})
    request = ChatCompletionRequest(messages=HELLO, tools=[*TOOLS, wrong], tool_choice="required")
    form = structured_outputs(request)
    assert form is not None
    with pytest.raises(APIError) as refused, naming_the_field(request):
        shipped_grammars().compile(form)
    assert refused.value.param == "tools[1].function.parameters"
    assert refused.value.message == (
        "tools[1].function.parameters: this schema cannot be used: failed to compile JSON schema: "
        "regex parse error: ( error: unclosed group"
    )
