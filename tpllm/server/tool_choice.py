"""Parse `tool_choice`: the tools that an answer may call, and whether it must call one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tpllm.checks import short
from tpllm.server.errors import invalid
from tpllm.server.protocol import ChatCompletionRequest, Tool


class ToolChoice(NamedTuple):
    """The parsed `tool_choice` of a request.

    Attributes:
        tools: the tools that the answer may call; empty if it may call none
        must_call: whether it must call one
        is_named: whether the request names the one function to call
    """

    tools: Sequence[Tool]
    must_call: bool
    is_named: bool = False


def tool_choice(body: ChatCompletionRequest) -> ToolChoice:
    """Return the parsed `tool_choice` of a request.

    Raises:
        APIError: 400, it names none of the request's tools, or has an unknown format.
    """
    choice, tools = body.tool_choice, body.tools or []
    if choice == "none":
        return ToolChoice([], False)
    if choice in (None, "auto"):
        return ToolChoice(tools, False)
    if choice == "required":
        return ToolChoice(_some(tools, body), True)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        return _allowed(allowed if isinstance(allowed, dict) else {}, body)
    return ToolChoice(_some(_named([choice], tools), body), True, is_named=True)


def _allowed(allowed: dict[str, Any], body: ChatCompletionRequest) -> ToolChoice:
    """Parse OpenAI's `allowed_tools`, which allows only some of the tools."""
    mode, names = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required") or not isinstance(names, list):
        raise invalid(
            f"tool_choice={short(body.tool_choice)} must have allowed_tools with a mode, 'auto' or "
            "'required', and tools, a list"
        )
    return ToolChoice(_some(_named(names, body.tools or []), body), mode == "required")


def _named(choices: Sequence[Any], tools: Sequence[Tool]) -> list[Tool]:
    """Return the tools that {"function": {"name": ...}} names."""
    functions = [each.get("function") for each in choices if isinstance(each, dict)]
    names = [each.get("name") for each in functions if isinstance(each, dict)]
    return [tool for tool in tools if tool.function.name in names]


def _some(tools: Sequence[Tool], body: ChatCompletionRequest) -> Sequence[Tool]:
    if not tools:
        raise invalid(
            f"tool_choice={short(body.tool_choice)} names none of the {len(body.tools or [])} "
            "tools; use 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    return tools
