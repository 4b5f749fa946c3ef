"""Reasoning, content and tool calls, told apart in the same way however the text is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpllm.server.answer_parser import (
    AnswerParser,
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
    tools: bool = True,
    max_calls: int | None = None,
) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and name and arguments of each call."""
    parser = AnswerParser(thinking, tools, max_calls)
    pieces = [piece for part in parts for piece in parser.feed(part)] + parser.finish()
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
        ("<think>cut off \n", "cut off", ""),
        ("so <think>no</think>", "", "so <think>no</think>"),
        ("<thin", "", "<thin"),
        ("  so", "", "  so"),
        ("a < b </think>", "", "a < b </think>"),
    ],
)
def test_reasoning_stands_at_the_beginning(text: str, reasoning: str, content: str) -> None:
    assert taken_apart([text]) == (reasoning, content, [])
    assert taken_apart(list(text)) == (reasoning, content, [])


def test_a_prompt_tells_where_its_answer_begins() -> None:
    assert Thinking.after("<|im_start|>assistant\n<think>\n") is Thinking.OPEN
    assert Thinking.after("assistant\n<think>\n\n</think>\n\n") is Thinking.NONE
    assert Thinking.after("<|im_start|>assistant\n") is Thinking.POSSIBLE
    assert taken_apart(["\nwhy\n</think>so"], Thinking.OPEN) == ("why", "so", [])
    assert taken_apart(["<think>so"], Thinking.NONE) == ("", "<think>so", [])


def test_a_call_gives_its_name_and_arguments_word_for_word() -> None:
    arguments = '{"a": "}</tool_call>\\"", "b": [1]}'
    for parts in ([CALL], list(CALL)):
        assert taken_apart(parts) == ("", "", [("f", arguments)])
    assert json.loads(arguments) == {"a": '}</tool_call>"', "b": [1]}


def test_arguments_are_passed_on_before_the_call_ends() -> None:
    parser = AnswerParser(Thinking.NONE, tools=True)
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
    ],
)
def test_a_call_in_another_form_is_understood(call: str, name: str, arguments: str) -> None:
    text = f"<tool_call>{call}</tool_call>"
    assert taken_apart([text]) == taken_apart(list(text)) == ("", "", [(name, arguments)])


def test_a_call_with_a_long_beginning_comes_whole() -> None:
    call = '<tool_call>{"name": "' + "f" * 3000 + '", "arguments": {"a": 1}}</tool_call>'
    for parts in ([call], [call[i : i + 7] for i in range(0, len(call), 7)]):
        assert taken_apart(parts) == ("", "", [("f" * 3000, '{"a": 1}')])


def test_calls_stand_apart_from_the_text_around_them() -> None:
    text = f"<think>x</think>\nfirst \n{CALL}\n{CALL}\nlast\n"
    reasoning, content, calls = taken_apart(list(text))
    assert (reasoning, content, len(calls)) == ("x", "firstlast\n", 2)
    assert taken_apart([text], max_calls=1)[2] == calls[:1]


@pytest.mark.parametrize("text", ["<tool_call>no json</tool_call>", "<tool_call>{", "a <tool"])
def test_what_is_no_call_is_content(text: str) -> None:
    assert taken_apart([text]) == taken_apart(list(text)) == ("", text, [])


def test_a_call_that_is_cut_off_keeps_what_came_of_it() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": '
    assert taken_apart(list(text)) == ("", "", [("f", '{"a": ')])


def test_without_tools_a_call_is_content() -> None:
    assert taken_apart(list(CALL), tools=False) == ("", CALL, [])


PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {"a": 1}}',
]


@given(
    st.lists(st.sampled_from([*PIECES, " ", "\n", "x", "<", '"', "}", "tool_call>"]), max_size=12),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.sampled_from(list(Thinking)),
    st.booleans(),
)
def test_the_cuts_change_nothing(
    words: list[str], sizes: list[int], thinking: Thinking, tools: bool
) -> None:
    text = "".join(words)
    parts, rest = [], text
    for i in range(len(text)):
        size = sizes[i % len(sizes)]
        parts.append(rest[:size])
        rest = rest[size:]
    assert taken_apart(parts, thinking, tools) == taken_apart([text], thinking, tools)
