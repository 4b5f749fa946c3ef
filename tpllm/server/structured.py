"""Fields that bind an answer to a form, as StructuredOutputsParams."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tpllm.checks import short
from tpllm.server.answer_parser import CALL, END_CALL
from tpllm.server.errors import APIError
from tpllm.server.protocol import ChatCompletionRequest, Structured, Tool
from tpllm.server.tool_choice import tool_choice
from tpllm.structured_outputs import StructuredOutputsParams

# vLLM's older names
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}

# how models are shown calls, and llguidance's way to ask for it
_ONE_LINE = {"whitespace_pattern": " ?"}
# keys of a schema that says nothing of an object's content, beside empty `properties`
_WITHOUT_CONTENT = {"$schema", "title", "description", "type", "properties", "required"}
_NO_CONTENT = {"type": "object", "properties": {}, "additionalProperties": False}
_OUR_NAMES = ("StructuredOutputsParams: ", "StructuredOutputsParams ", "structured_outputs ")
_RULES_BEFORE_TOOLS = 3  # of the grammar of calls; then each tool has two
# where llguidance finds a mistake in it: line and column before the reason, lines around after it
_PLACE = re.compile(r"at (\d+)\(\d+\): (.*?)(?= \d+ \| |$)")


def structured_outputs(body: Structured) -> StructuredOutputsParams | None:
    """The form that a request asks for; None for any text.

    Raises:
        APIError: 400: several fields ask for one, or one is wrong, or a tool takes no object.
            Whether it can be compiled is the engine's affair: see `naming_the_field`.
    """
    if isinstance(body, ChatCompletionRequest):
        _check_tools(body.tools or [])
    forms = _forms(body)
    if not forms:
        return None
    field = next(iter(forms))
    if len(forms) > 1:
        raise APIError(
            400, f"{' and '.join(forms)} all say what the answer must be; keep one", param=field
        )
    try:
        return _params(field, forms[field])
    except APIError as error:
        if isinstance(body, ChatCompletionRequest) and error.message.startswith(
            "tool_choice: %json"
        ):
            _check_schemas(body)
        raise


def _params(field: str, form: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**form)
    except ValueError as error:
        words = str(error)
        # the client has sent a schema in its own field, or the fields of structured_outputs
        for ours in ("json: ",) if field != "structured_outputs" else _OUR_NAMES:
            words = words.removeprefix(ours)
        raise APIError(400, f"{field}: {words}", param=field) from None


@contextmanager
def naming_the_field(body: Structured) -> Iterator[None]:
    """What the engine finds wrong with the form, as a mistake in the field that the client sent.

    Raises:
        APIError: 400, instead of the engine's ValueError.
    """
    try:
        yield
    except ValueError as error:
        words, refused, reason = str(error).partition(" cannot be used: ")
        forms = _forms(body)
        if not words.startswith("structured_outputs") or not forms:
            raise
        field, what = next(iter(forms)), "what it asks for"
        if not refused:  # beside other settings, no token fits
            words = field + words.removeprefix("structured_outputs")
            raise APIError(400, words, param=field) from None
        if field == "tool_choice" and isinstance(body, ChatCompletionRequest):
            field, what, reason = _blamed_tool(body, reason)
        raise APIError(400, f"{field}: {what} cannot be used: {reason}", param=field) from None


def _blamed_tool(body: ChatCompletionRequest, reason: str) -> tuple[str, str, str]:
    """The field, what it holds, and what is wrong with it, of calls that cannot be compiled."""
    if found := _PLACE.search(reason):
        number = (int(found[1]) - 1 - _RULES_BEFORE_TOOLS) // 2
        chosen = tool_choice(body).tools
        if 0 <= number < len(chosen) and body.tools:
            return _parameters(body.tools.index(chosen[number])), "this schema", found[2]
    return "tool_choice", "a tool's parameters", reason


def _forms(body: Structured) -> dict[str, dict[str, Any]]:
    """Keywords of StructuredOutputsParams, by the field that asks for them."""
    forms: dict[str, dict[str, Any]] = {}
    if body.response_format is not None:
        form = _response_format(body.response_format)
        if form is not None:
            forms["response_format"] = form
    if body.structured_outputs is not None:
        forms["structured_outputs"] = body.structured_outputs
    for field, name in _GUIDED.items():
        if (value := getattr(body, field)) is not None:
            forms[field] = {name: value}
    if isinstance(body, ChatCompletionRequest):
        choice = tool_choice(body)
        if choice.must_call:
            several = body.parallel_tool_calls is not False and not choice.is_named
            forms["tool_choice"] = {"grammar": _calls(choice.tools, several)}
    return forms


def _parameters(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _check_tools(tools: Sequence[Tool]) -> None:
    """As OpenAI does, whatever the choice: arguments are an object."""
    for i, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type")
        if kind not in (None, "object") and not (isinstance(kind, list) and "object" in kind):
            raise APIError(
                400,
                f"{_parameters(i)} has type {short(kind)}; the arguments of a function are an "
                'object: use "type": "object"',
                param=_parameters(i),
            )


def _check_schemas(body: ChatCompletionRequest) -> None:
    """Refuse the first schema that is wrong, of the tools that the answer must choose from."""
    tools = body.tools or []
    for tool in tool_choice(body).tools:
        form = {"json": _arguments(tool.function.parameters or {})}
        _params(_parameters(tools.index(tool)), form)


def _response_format(value: dict[str, Any]) -> dict[str, Any] | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and value.get("schema") is None:
        return {"json_object": True}
    if kind not in ("json_object", "json_schema"):
        raise APIError(
            400,
            f"response_format of type {short(kind)} is not supported; use 'json_schema', "
            "'json_object' or 'text'",
            param="response_format",
        )
    # llama.cpp and others take a schema beside "json_object", too
    name = "schema" if kind == "json_object" else "json_schema.schema"
    described = value if kind == "json_object" else value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise APIError(
            400,
            f"response_format of type {kind!r} needs {name}, a JSON schema",
            param="response_format",
        )
    return {"json": schema}


def _calls(tools: Sequence[Tool], several: bool) -> str:
    """A grammar of one call, or of one and more, as Qwen3 writes them."""
    begin, end = _quoted(f'{CALL}\n{{"name": '), _quoted(f"}}\n{END_CALL}")
    rules = [
        "start: call" + (f" ({_quoted(chr(10))} call)*" if several else ""),
        f"call: {begin} tool {end}",
        f"tool: {' | '.join(f'tool_{i}' for i in range(len(tools)))}",
    ]
    for i, tool in enumerate(tools):
        head = _quoted(json.dumps(tool.function.name, ensure_ascii=False) + ', "arguments": ')
        # each schema stands alone, so that its references find their own definitions
        schema = {**_arguments(tool.function.parameters or {}), "x-guidance": _ONE_LINE}
        rules.append(f"tool_{i}: {head} arguments_{i}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: an object, also where `parameters` let null pass.

    Without a schema, or with one whose `properties` are empty, a function takes no arguments, as
    OpenAI has it. A bare {"type": "object"} takes any.
    """
    is_empty = parameters.get("properties") == {} and not parameters.get("required")
    if not parameters or (is_empty and parameters.keys() <= _WITHOUT_CONTENT):
        return _NO_CONTENT
    return {**parameters, "type": "object"}


def _quoted(text: str) -> str:
    """As a grammar writes it down."""
    return json.dumps(text, ensure_ascii=False)
