"""How each family of models writes tool calls and reasoning, and which of them a model uses."""

from typing import Literal, NamedTuple, get_args

from tpllm.server.answer_pieces import END_THINK

ToolCallParser = Literal["auto", "hermes", "llama3_json", "mistral"]
ReasoningParser = Literal["auto", "qwen3", "deepseek_r1"]


class ToolFormat(NamedTuple):
    """A format of tool calls. "*" in the last three stands for what the next one describes.

    Attributes:
        tag: begins calls
        end: ends a call; "" if only its object's end does
        separator: between two calls under one tag; "" if each has its own
        arguments: the key of the arguments; Llama's models mix up two of them
        is_bare: an answer that begins with an object of name and arguments is a call, too
        is_special: the tag is a special token, so special tokens must be in the text
        has_names: a call may also be the name, "[ARGS]" and the arguments; several may be in a list
        answer, between, call: how a forced answer is written: around its calls, between two calls,
            and around name, arguments
    """

    tag: str
    end: str = ""
    separator: str = ""
    arguments: tuple[str, ...] = ("arguments",)
    is_bare: bool = False
    is_special: bool = True
    has_names: bool = False
    answer: str = "*"
    between: str = "\n"
    call: str = '{"name": *, "arguments": *}'


HERMES = ToolFormat(
    "<tool_call>",
    "</tool_call>",
    is_special=False,
    call='<tool_call>\n{"name": *, "arguments": *}\n</tool_call>',
)
TOOL_FORMATS = {
    "hermes": HERMES,
    "llama3_json": ToolFormat(
        "<|python_tag|>",
        separator=";",
        arguments=("parameters", "arguments"),
        is_bare=True,
        between="; ",
        call='{"name": *, "parameters": *}',
    ),
    "mistral": ToolFormat(
        "[TOOL_CALLS]", separator=",", has_names=True, answer="[TOOL_CALLS] [*]", between=", "
    ),
}
assert set(TOOL_FORMATS) | {"auto"} == set(get_args(ToolCallParser))


def tool_format(parser: ToolCallParser, chat_template: str) -> ToolFormat:
    """Return the format of the parser's name; "auto" takes that of the chat template."""
    if parser == "auto":
        is_llama = "<|start_header_id|>" in chat_template and '"parameters"' in chat_template
        if "[TOOL_CALLS]" in chat_template:
            parser = "mistral"
        else:
            parser = "llama3_json" if is_llama else "hermes"
    return TOOL_FORMATS[parser]


def always_reasons(parser: ReasoningParser, chat_template: str) -> bool:
    """Whether an answer begins with reasoning even without <think>, as DeepSeek-R1's do."""
    if parser == "auto":
        return "<\uff5cAssistant\uff5c>" in chat_template and END_THINK in chat_template
    return parser == "deepseek_r1"
