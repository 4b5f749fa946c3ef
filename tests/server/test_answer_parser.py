"""Reasoning, content and tool calls, separated in the same way however the text is divided."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpllm.server.answer_formats import HERMES, TOOL_FORMATS, ToolFormat
from tpllm.server.answer_parser import AnswerParser
from tpllm.server.answer_pieces import (
    CallArguments,
    CallStart,
    Content,
    Reasoning,
    Thinking,
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>\\"", "b": [1]}}\n</tool_call>'


def taken_apart(
    parts: list[str],
    thinking: Thinking = Thinking.POSSIBLE,
    tools: ToolFormat | None = HERMES,
    max_calls: int | None = None,
    only_calls: bool = False,
    is_cut: bool = False,
) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and name and arguments of each call."""
    parser = AnswerParser(thinking, tools, max_calls, only_calls)
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish(is_cut)
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + piece.text)
    assert parser.num_calls == len(calls)
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    return reasoning, content, calls


@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("<think>\nwhy\n</think>\n\nso", "why", "so"),
        ("\n<think>why</think>so ", "why", "so "),
        ("<think>\n\n</think>\n\nso", "", "so"),
        ("<think>cut off \n", "cut off \n", ""),
        ("<think>\n\ncut </thin", "cut </thin", ""),
        ("so <think>no</think>", "", "so <think>no</think>"),
        ("<thin", "", "<thin"),
        ("  so", "", "  so"),
        ("a < b </think>", "", "a < b </think>"),
    ],
)
def test_reasoning_comes_only_at_the_beginning(text: str, reasoning: str, content: str) -> None:
    assert taken_apart([text]) == (reasoning, content, [])
    assert taken_apart(list(text)) == (reasoning, content, [])


def test_the_prompt_decides_whether_the_answer_begins_with_reasoning() -> None:
    assert Thinking.after("<|im_start|>assistant\n<think>\n") is Thinking.OPEN
    assert Thinking.after("assistant\n<think>\n\n</think>\n\n") is Thinking.NONE
    assert Thinking.after("<|im_start|>assistant\n") is Thinking.POSSIBLE
    assert taken_apart(["\nwhy\n</think>so"], Thinking.OPEN) == ("why", "so", [])
    assert taken_apart(["<think>so"], Thinking.NONE) == ("", "<think>so", [])


def test_name_and_arguments_of_a_call_are_unchanged() -> None:
    arguments = '{"a": "}</tool_call>\\"", "b": [1]}'
    for parts in ([CALL], list(CALL)):
        assert taken_apart(parts) == ("", "", [("f", arguments)])
    assert json.loads(arguments) == {"a": '}</tool_call>"', "b": [1]}


def test_arguments_are_streamed_before_the_call_ends() -> None:
    parser = AnswerParser(Thinking.NONE, tools=HERMES)
    pieces = parser.feed('<tool_call>{"name": "f", "arguments": {"a": 1')
    assert pieces == [CallStart(0, "f"), CallArguments(0, '{"a": 1')]
    assert parser.feed(', "b": 2}') == [CallArguments(0, ', "b": 2}')]
    assert parser.feed("}</tool_call>") + parser.finish() == []


@pytest.mark.parametrize(
    "call, name, arguments",
    [
        ('{"arguments": {"a": 1}, "name": "f"}', "f", '{"a": 1}'),
        ('{"name": "f"}', "f", "{}"),
        ('{"name": "f", "arguments": "{}"}', "f", "{}"),
        ('{"name": "f", "arguments": {}, "more": 1}', "f", "{}"),
        ('{"name": "\\u0066", "arguments": {}}', "f", "{}"),
        ('{"name": "f", "arguments": null}', "f", "{}"),
        ('{"arguments": {"a": "</tool_call>"}, "name": "f"}', "f", '{"a": "</tool_call>"}'),
        ('{"id": {}, "name": "f", "arguments": {"a": 1}}', "f", '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": "b\n\tc"}}', "f", '{"a": "b\\n\\tc"}'),
        ('{"name": "f", "arguments": {"a": 1}', "f", '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}}}', "f", '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": [1}', "f", '{"a": [1}'),
        ('{"name": "f", "arguments": {"a": "<", "b": <', "f", '{"a": "<", "b": <'),
    ],
)
def test_a_call_with_another_key_order_is_parsed(call: str, name: str, arguments: str) -> None:
    text = f"<tool_call>{call}</tool_call>"
    assert taken_apart([text]) == taken_apart(list(text)) == ("", "", [(name, arguments)])


def test_a_call_with_a_long_beginning_is_parsed() -> None:
    call = '<tool_call>{"name": "' + "f" * 3000 + '", "arguments": {"a": 1}}</tool_call>'
    for parts in ([call], [call[i : i + 7] for i in range(0, len(call), 7)]):
        assert taken_apart(parts) == ("", "", [("f" * 3000, '{"a": 1}')])


def test_calls_are_separate_from_the_text_around_them() -> None:
    text = f"<think>x</think>\nfirst \n{CALL}\n{CALL}\nlast\n"
    reasoning, content, calls = taken_apart(list(text))
    assert (reasoning, content, len(calls)) == ("x", "firstlast\n", 2)
    assert taken_apart([text], max_calls=1)[2] == calls[:1]


NO_CALLS = [
    "<tool_call>no json</tool_call>",
    "<tool_call>{",
    "a <tool",
    "Use <tool_call> tags, they say.",
    "a\n\n<tool_call>\n[1]\n</tool_call>\n\nb",
    " `<tool_call>` ends with `</tool_call>` \n",
    '<tool_call> {"name": 3} </tool_call> ',
    '<tool_call> {"name": "f", "arguments": [1, 2} } </tool_call> ',
    '<tool_call>{"name": "f", "argument',
    '\n<tool_call>\n{"a b',
    "<tool_call>\n\n",
    "<tool_call> <tool_call>\n<tool_call>",
    "</think> x </tool_call> <think> ",
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_text_that_is_no_call_is_content(text: str) -> None:
    assert taken_apart([text]) == taken_apart(list(text)) == ("", text, [])


@pytest.mark.parametrize("text", [" <tool_call> x ", '<tool_call>{"a', '<tool_call>{"name": 3}'])
def test_a_call_after_a_tag_that_begins_none_is_found(text: str) -> None:
    arguments = '{"a": "}</tool_call>\\"", "b": [1]}'
    for parts in ([text + CALL], list(text + CALL)):
        assert taken_apart(parts) == ("", text.rstrip(), [("f", arguments)])


@pytest.mark.parametrize("between", ["", "\n", "}\n", " \n\n"])
def test_calls_without_a_closing_tag_are_calls(between: str) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}'
    text = between.join([call] * 3)
    calls = [("f", '{"a": 1}')] * 3
    assert taken_apart([text]) == taken_apart(list(text)) == ("", "", calls)
    for ending in ("\n", "\n</tool_ca"):
        assert taken_apart([text + ending]) == ("", "", calls)
    assert taken_apart(list(text + " so")) == ("", " so", calls)


def test_a_truncated_call_keeps_its_beginning() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": '
    assert taken_apart(list(text)) == ("", "", [("f", '{"a": ')])


@pytest.mark.parametrize("only_calls", [False, True])
def test_a_call_truncated_anywhere_leaves_no_tag_in_the_content(only_calls: bool) -> None:
    text = f"{CALL}\n{CALL}"
    for length in range(len(text)):
        shown = text[:length]
        cut = taken_apart([shown], only_calls=only_calls, is_cut=True)
        assert cut == taken_apart(list(shown), only_calls=only_calls, is_cut=True)
        _, content, calls = cut
        assert content == "" or (not only_calls and "<tool_call>".startswith(content.strip()))
        names = shown.count('"f"')
        assert len(calls) == names
        assert all(CALL.find(arguments) >= 0 for _, arguments in calls)


def test_a_truncated_call_with_another_key_order_is_dropped() -> None:
    text = 'so <tool_call>{"arguments": {"a": 1}, "na'
    assert taken_apart([text], is_cut=True) == ("", "so", [])
    assert taken_apart([text]) == ("", text, [])


def test_without_tools_a_call_is_content() -> None:
    assert taken_apart(list(CALL), tools=None) == ("", CALL, [])


PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {"a": 1}}',
]


FOREIGN = ["tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[", "]", ",", ";", "f{"]
FOREIGN += ['{"name": "f", "parameters": {"a": 1}}', '{"name": "f"}', '{"name"']
OTHERS = [
    "[1]",
    '{"name": 3}',
    '{"',
    "{",
    "}",
    '"',
    "\\\\",
    " ",
    "\n",
    "x",
    "<",
    "</",
    "tool_call>",
]
PROSE = st.lists(st.sampled_from([*PIECES[:4], *OTHERS]), max_size=12).map("".join)
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=20)


def cut_up(text: str, sizes: list[int]) -> list[str]:
    parts, rest = [], text
    for i in range(len(text)):
        size = sizes[i % len(sizes)]
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


@given(PROSE, SIZES)
def test_prose_that_mentions_tags_is_content_in_any_pieces(text: str, sizes: list[int]) -> None:
    assert taken_apart(cut_up(text, sizes), Thinking.NONE) == ("", text, [])


@given(PROSE, PROSE, PROSE, SIZES)
def test_text_beside_tags_and_calls_is_kept(
    thought: str, before: str, after: str, sizes: list[int]
) -> None:
    thought = thought.replace("</think>", "")
    text = f"<think>{thought}\n</think>\n\n{before}\n{CALL}\n{after}"
    reasoning, content, calls = taken_apart(cut_up(text, sizes))
    assert (reasoning, len(calls)) == (thought.strip(), 1)
    assert content == before.strip() + after.lstrip()


HOSTILE = [
    " ",
    "<",
    "<tool_call>",
    "<tool_call>{",
    '<tool_call>{"a',
    '<tool_call>{":',
    '<tool_call>{"a":"',
    '<tool_call>{"a":{},',
    '<tool_call>{"\\\\"',
    '<tool_call>{"name":"f","arguments":{}}',
]


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("size", [7, 10**6])
def test_a_hostile_text_is_parsed_quickly(unit: str, size: int) -> None:
    text = unit * (200_000 // len(unit))
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    begin = time.process_time()
    taken_apart(parts)
    assert time.process_time() - begin < 20


@given(
    st.lists(st.sampled_from([*PIECES, *FOREIGN, " ", "\n", "x", "<", '"', "}"]), max_size=12),
    SIZES,
    st.sampled_from(list(Thinking)),
    st.sampled_from([None, *TOOL_FORMATS.values()]),
    st.booleans(),
)
def test_the_result_does_not_depend_on_the_pieces(
    words: list[str], sizes: list[int], thinking: Thinking, tools: ToolFormat | None, is_cut: bool
) -> None:
    text = "".join(words)
    parts = cut_up(text, sizes)
    whole = taken_apart([text], thinking, tools, is_cut=is_cut)
    assert taken_apart(parts, thinking, tools, is_cut=is_cut) == whole
