"""Conversations as chat templates read them, from the forms in which OpenAI's clients keep them.

`LLM.chat` and the server both come through here, so that a conversation has one prompt. Templates
differ in what they bear: they get text contents, the older names of roles, and objects as the
arguments of tool calls. Keys that are not named here are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from tpllm.checks import is_unicode, short

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What templates call the roles that OpenAI has renamed.
_NAMES_OF_ROLES = {"developer": "system", "function": "tool"}
_MAY_HAVE_NO_CONTENT = ("assistant", "tool", "function")
# Kinds of content parts, and the key of their text.
_TEXT_OF_PART = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# Of arguments, beyond which they stay a text: `tojson` gives up at some hundreds.
_MAX_DEPTH = 64


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Messages with `role`, `content` (a text) and, where they have some, `name`,
    `reasoning_content`, `tool_calls` and `tool_call_id`.

    The arguments of a tool call are an object. Where a client has some other text there, such as
    the beginning of an object that the limit of tokens has cut, they are this text.

    Raises:
        ValueError: names the message or the part that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={short(messages)} must be a list of at least one message")
    return [_plain_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def with_object_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Plain messages for a template that takes no text as arguments; None if they have no such."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if not any(isinstance(call["function"]["arguments"], str) for call in calls):
        return None

    def with_object(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            arguments = {"arguments": arguments}
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**message, "tool_calls": list(map(with_object, message["tool_calls"]))}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def plain_tools(tools: Sequence[Any] | None) -> list[Any] | None:
    """Tools as OpenAI describes functions, without further keys. Other forms stay as they are."""
    return [_plain_tool(tool) for tool in tools] if tools else None


def _plain_tool(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        return tool
    names = ("name", "description", "parameters")
    kept = {name: function[name] for name in names if function.get(name) is not None}
    return {"type": "function", "function": kept}


def _plain_message(place: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{place}={short(message)} must be {{"role": ..., "content": ...}}')
    role = _text(message, "role", place)
    if role is None:
        raise ValueError(f"{place}.role is missing; every message needs one")
    plain = {"role": _NAMES_OF_ROLES.get(role, role), "content": _content(message, role, place)}
    optional = {
        "name": _text(message, "name", place),
        # templates know the older of its two names alone
        "reasoning_content": _text(message, "reasoning", place)
        or _text(message, "reasoning_content", place),
        "tool_calls": _calls(message, place),
        "tool_call_id": _text(message, "tool_call_id", place),
    }
    return plain | {name: value for name, value in optional.items() if value}


def _text(owner: Mapping[str, Any], name: str, place: str) -> str | None:
    """A text that may be left out."""
    value = owner.get(name)
    return None if value is None else _checked(value, f"{place}.{name}")


def _checked(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}={short(value)} must be a text")
    if not is_unicode(value):
        raise ValueError(f"{place} holds a lone surrogate, which is not valid Unicode")
    return value


def _content(message: Mapping[str, Any], role: str, place: str) -> str:
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_text_of_part(part, f"{place}.content[{i}]") for i, part in enumerate(content)]
        return "\n".join(parts)
    if content is not None:
        if not isinstance(content, str):
            raise ValueError(f"{place}.content={short(content)} must be a text, or a list of parts")
        return _checked(content, f"{place}.content")
    if role not in _MAY_HAVE_NO_CONTENT:
        raise ValueError(
            f"{place}.content is missing; only an assistant's or a tool's may be left out"
        )
    if message.get("audio") is not None:
        raise ValueError(f"{place}.audio cannot be read; send what was said as content")
    refusal = message.get("refusal")
    return _checked(refusal, f"{place}.refusal") if isinstance(refusal, str) else ""


def _text_of_part(part: object, place: str) -> str:
    if isinstance(part, str):
        return _checked(part, place)
    if not isinstance(part, Mapping):
        raise ValueError(f'{place}={short(part)} must be {{"type": "text", "text": ...}}')
    kind = part.get("type") or "text"
    if not isinstance(kind, str) or kind not in _TEXT_OF_PART:
        raise ValueError(f"{place}.type={short(kind)} cannot be read by this model; send text")
    text = _text(part, _TEXT_OF_PART[kind], place)
    if text is None:
        raise ValueError(f"{place}.{_TEXT_OF_PART[kind]} is missing; a part needs its text")
    return text


def _calls(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if not calls and message.get("function_call") is not None:  # OpenAI's older form
        place = f"{place}.function_call"
        return [{"type": "function", "function": _function(message["function_call"], place)}]
    if calls is None:
        return []
    place = f"{place}.tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"{place}={short(calls)} must be a list")
    return [_call(call, f"{place}[{i}]") for i, call in enumerate(calls)]


def _call(call: object, place: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{place}={short(call)} must be an object")
    if call.get("type") not in (None, "", "function"):
        raise ValueError(f"{place}.type={short(call['type'])} must be 'function'")
    id_ = _text(call, "id", place)
    function = _function(call.get("function"), f"{place}.function")
    return {**({} if id_ is None else {"id": id_}), "type": "function", "function": function}


def _function(function: object, place: str) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise ValueError(f'{place}={short(function)} must be {{"name": ..., "arguments": ...}}')
    name = _text(function, "name", place)
    if name is None:
        raise ValueError(f"{place}.name is missing; a call needs one")
    return {"name": name, "arguments": _arguments(function.get("arguments"), f"{place}.arguments")}


def _arguments(arguments: object, place: str) -> dict[str, Any] | str:
    """The object that a JSON text stands for, or any other text as it is."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    text = "" if arguments is None else _checked(arguments, place)
    if not text.strip():
        return {}
    if _depth(text) > _MAX_DEPTH:
        return text
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # an escape may stand for a lone surrogate
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _depth(text: str) -> int:
    """How deep brackets are nested; those inside JSON's strings count, too."""
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", text))
    return max(accumulate(steps), default=0)
