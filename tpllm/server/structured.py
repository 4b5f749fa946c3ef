"""Convert a request's fields for structured outputs to StructuredOutputsParams."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tpllm.checks import short
from tpllm.server.answer_formats import HERMES, ToolFormat
from tpllm.server.errors import APIError, invalid
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

# llguidance's option for calls on one line, as models are trained on them
_ONE_LINE = {"whitespace_pattern": " ?"}
# keys of a schema with empty `properties` that does not describe an object's content
_WITHOUT_CONTENT = {"$schema", "title", "description", "type", "properties", "required"}
_NO_CONTENT = {"type": "object", "properties": {}, "additionalProperties": False}
_OUR_NAMES = ("StructuredOutputsParams: ", "StructuredOutputsParams ", "structured_outputs ")
_RULES_BEFORE_TOOLS = 3  # of the grammar of calls; then each tool has two
# llguidance's errors: line and column before the reason, and the lines around it after it
_PLACE = re.compile(r"at (\d+)\(\d+\): (.*?)(?= \d+ \| |$)")


def structured_outputs(
    body: Structured, tools: ToolFormat = HERMES
) -> StructuredOutputsParams | None:
    """Return the constraint of a request, with forced calls in a format; None if it has none.

    The engine compiles it later: see `naming_the_field`.

    Raises:
        APIError: 400, several fields have one, or one is wrong, or a tool's arguments are not an
            object.
    """
    if isinstance(body, ChatCompletionRequest):
        _check_tools(body.tools or [])
    constraints = _constraints(body, tools)
    if not constraints:
        return None
    field = next(iter(constraints))
    if len(constraints) > 1:
        raise invalid(f"{' and '.join(constraints)} exclude each other; keep one of them")
    try:
        return _params(field, constraints[field])
    except APIError as error:
        if isinstance(body, ChatCompletionRequest) and error.message.startswith(
            "tool_choice: %json"
        ):
            _check_schemas(body)
        raise


def _params(field: str, constraint: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**constraint)
    except ValueError as error:
        words = str(error)
        # remove our names: the client sent its own field
        for ours in ("json: ",) if field != "structured_outputs" else _OUR_NAMES:
            words = words.removeprefix(ours)
        raise invalid(f"{field}: {words}") from None


@contextmanager
def naming_the_field(body: Structured) -> Iterator[None]:
    """Turn the engine's error about a constraint into one about the field that the client sent.

    Raises:
        APIError: 400, instead of the engine's ValueError.
    """
    try:
        yield
    except ValueError as error:
        words, refused, reason = str(error).partition(" cannot be used: ")
        constraints = _constraints(body)
        if not words.startswith("structured_outputs") or not constraints:
            raise
        field, what = next(iter(constraints)), "its value"
        if not refused:  # it leaves no token beside the request's other settings
            words = field + words.removeprefix("structured_outputs")
            raise invalid(words) from None
        if field == "tool_choice" and isinstance(body, ChatCompletionRequest):
            field, what, reason = _blamed_tool(body, reason)
        raise invalid(f"{field}: {what} cannot be used: {reason}") from None


def _blamed_tool(body: ChatCompletionRequest, reason: str) -> tuple[str, str, str]:
    """Return the field, its content and the reason, for calls that cannot be compiled."""
    if found := _PLACE.search(reason):
        number = (int(found[1]) - 1 - _RULES_BEFORE_TOOLS) // 2
        chosen = tool_choice(body).tools
        if 0 <= number < len(chosen) and body.tools:
            return _parameters(body.tools.index(chosen[number])), "this schema", found[2]
    return "tool_choice", "a tool's parameters", reason


def _constraints(body: Structured, tools: ToolFormat = HERMES) -> dict[str, dict[str, Any]]:
    """Return the keywords of StructuredOutputsParams, by the request's field."""
    constraints: dict[str, dict[str, Any]] = {}
    if body.response_format is not None:
        constraint = _response_format(body.response_format)
        if constraint is not None:
            constraints["response_format"] = constraint
    if body.structured_outputs is not None:
        constraints["structured_outputs"] = body.structured_outputs
    for field, name in _GUIDED.items():
        if (value := getattr(body, field)) is not None:
            constraints[field] = {name: value}
    if isinstance(body, ChatCompletionRequest):
        choice = tool_choice(body)
        if choice.must_call:
            several = body.parallel_tool_calls is not False and not choice.is_named
            constraints["tool_choice"] = {"grammar": _calls(tools, choice.tools, several)}
    return constraints


def _parameters(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _check_tools(tools: Sequence[Tool]) -> None:
    """Check that the arguments of all tools are objects, as OpenAI does."""
    for i, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type")
        if kind not in (None, "object") and not (isinstance(kind, list) and "object" in kind):
            raise invalid(
                f"{_parameters(i)} has type {short(kind)}; the arguments of a function are an "
                'object: use "type": "object"'
            )


def _check_schemas(body: ChatCompletionRequest) -> None:
    """Refuse the first wrong schema of the tools that the answer may call."""
    tools = body.tools or []
    for tool in tool_choice(body).tools:
        constraint = {"json": _arguments(tool.function.parameters or {})}
        _params(_parameters(tools.index(tool)), constraint)


def _response_format(value: dict[str, Any]) -> dict[str, Any] | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and value.get("schema") is None:
        return {"json_object": True}
    if kind not in ("json_object", "json_schema"):
        raise invalid(
            f"response_format of type {short(kind)} is not supported; use 'json_schema', "
            "'json_object' or 'text'"
        )
    # llama.cpp and others take a schema beside "json_object", too
    name = "schema" if kind == "json_object" else "json_schema.schema"
    described = value if kind == "json_object" else value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise invalid(f"response_format of type {kind!r} needs {name}, a JSON schema")
    return {"json": schema}


def _calls(form: ToolFormat, tools: Sequence[Tool], several: bool) -> str:
    """Return a grammar of one call, or of one or more, in a format."""
    before, after = form.answer.split("*")
    begin, middle, end = form.call.split("*")
    calls = "call" + (f" ({_quoted(form.between)} call)*" if several else "")
    rules = [
        f"start: {_quoted(before)} {calls} {_quoted(after)}" if before else f"start: {calls}",
        f"call: {_quoted(begin)} tool {_quoted(end)}",
        f"tool: {' | '.join(f'tool_{i}' for i in range(len(tools)))}",
    ]
    for i, tool in enumerate(tools):
        head = _quoted(json.dumps(tool.function.name, ensure_ascii=False) + middle)
        # each schema is separate, so that its references find their own definitions
        schema = {**_arguments(tool.function.parameters or {}), "x-guidance": _ONE_LINE}
        rules.append(f"tool_{i}: {head} arguments_{i}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)


def _arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a call's arguments: an object, even if `parameters` allow null.

    Without a schema, or with empty `properties`, a function takes no arguments, as at OpenAI. A
    bare {"type": "object"} takes any.
    """
    is_empty = parameters.get("properties") == {} and not parameters.get("required")
    if not parameters or (is_empty and parameters.keys() <= _WITHOUT_CONTENT):
        return _NO_CONTENT
    return {**parameters, "type": "object"}


def _quoted(text: str) -> str:
    """Return a text as a string of a grammar."""
    return json.dumps(text, ensure_ascii=False)
