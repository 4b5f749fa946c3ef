"""Convert conversations from the formats of OpenAI's clients to what chat templates accept.

`LLM.chat` and the server both use this module, so a conversation has the same prompt in both.
Templates differ in what they accept. They receive string contents, the older names of roles, and
objects as the arguments of tool calls. Keys that are not named here are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from tpllm.checks import is_unicode, short

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# The older names of roles, which templates use.
_NAMES_OF_ROLES = {"developer": "system", "function": "tool"}
_MAY_HAVE_NO_CONTENT = ("assistant", "tool", "function")
# Kinds of content parts, and the key of their text.
_TEXT_OF_PART = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# Arguments that are nested more deeply stay a string: `tojson` fails at a few hundred levels.
_MAX_DEPTH = 64


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Return messages with `role`, `content` (a string) and the optional keys that are set.

    These are `name`, `reasoning_content`, `tool_calls` and `tool_call_id`. The arguments of a tool
    call become an object. If they are not JSON, such as an object that max_tokens has truncated,
    they stay a string.

    Raises:
        ValueError: a message is wrong; the error has its path.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={short(messages)} must be a list of at least one message")
    return [_plain_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def with_object_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return messages for a template that needs objects as arguments; None if all are objects."""
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
    """Return tools in OpenAI's format, without further keys. Other formats stay as they are."""
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
        # templates only know the older of the two names
        "reasoning_content": _text(message, "reasoning", place)
        or _text(message, "reasoning_content", place),
        "tool_calls": _calls(message, place),
        "tool_call_id": _text(message, "tool_call_id", place),
    }
    return plain | {name: value for name, value in optional.items() if value}


def _text(owner: Mapping[str, Any], name: str, place: str) -> str | None:
    """Return the string under a key; None if it is missing or null."""
    value = owner.get(name)
    return None if value is None else _checked(value, f"{place}.{name}")


def _checked(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}={short(value)} must be a string")
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
            raise ValueError(
                f"{place}.content={short(content)} must be a string, or a list of parts"
            )
        return _checked(content, f"{place}.content")
    if role not in _MAY_HAVE_NO_CONTENT:
        raise ValueError(
            f"{place}.content is missing; only the roles 'assistant' and 'tool' may leave it out"
        )
    if message.get("audio") is not None:
        raise ValueError(f"{place}.audio is not supported; send its transcript as content")
    refusal = message.get("refusal")
    return _checked(refusal, f"{place}.refusal") if isinstance(refusal, str) else ""


def _text_of_part(part: object, place: str) -> str:
    if isinstance(part, str):
        return _checked(part, place)
    if not isinstance(part, Mapping):
        raise ValueError(f'{place}={short(part)} must be {{"type": "text", "text": ...}}')
    kind = part.get("type") or "text"
    if not isinstance(kind, str) or kind not in _TEXT_OF_PART:
        raise ValueError(f"{place}.type={short(kind)} is not supported by this model; send text")
    text = _text(part, _TEXT_OF_PART[kind], place)
    if text is None:
        raise ValueError(f"{place}.{_TEXT_OF_PART[kind]} is missing; a part needs its text")
    return text


def _calls(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if not calls and message.get("function_call") is not None:  # OpenAI's older format
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
    """Return the object that a JSON string holds, or any other string as it is."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    text = "" if arguments is None else _checked(arguments, place)
    if not text.strip():
        return {}
    if _depth(text) > _MAX_DEPTH:
        return text
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # fails on an escaped lone surrogate
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _depth(text: str) -> int:
    """Return the nesting depth of brackets, including brackets within JSON strings."""
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[][{}]", text))
    return max(accumulate(steps), default=0)
