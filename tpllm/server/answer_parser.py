"""An assistant's text taken apart while it comes: reasoning, content and tool calls.

Qwen3 writes `<think>...</think>` before its answer, and calls a tool by
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Whitespace next to these tags belongs to
them. A text is taken apart in the same way however it is cut into pieces.
"""

import json
import re
from dataclasses import dataclass
from enum import Enum

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"

# Letters of a call in which its arguments must begin to be passed on as they come: what is looked
# through again whenever more has come must not be long.
MAX_HEAD_LENGTH = 2048
# A call in the order that Qwen3 is trained on: its arguments can be passed on as they come.
_CALL_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins. Calls count from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Reasoning | Content | CallStart | CallArguments


class Thinking(Enum):
    """What a prompt's end says of reasoning in the answer."""

    OPEN = "the prompt ends with <think>: the answer begins inside"
    POSSIBLE = "an answer that begins with <think> has reasoning"
    NONE = "it is no place for reasoning: all is content"

    @classmethod
    def after(cls, prompt: str) -> "Thinking":
        """How the answer to a rendered prompt begins."""
        end = prompt[-64:].rstrip()
        if end.endswith(THINK):
            return cls.OPEN
        return cls.NONE if end.endswith(END_THINK) else cls.POSSIBLE


class _State(Enum):
    START = 0
    REASONING = 1
    CONTENT = 2
    CALL_HEAD = 3
    CALL_ARGUMENTS = 4
    CALL_TAIL = 5


class AnswerParser:
    """Takes an answer's text in pieces of any size, and gives its parts back as they are sure.

    Args:
        thinking: whether reasoning is looked for
        tools: whether tool calls are looked for
        max_calls: calls beyond this many are left out; None keeps all
    """

    def __init__(self, thinking: Thinking, tools: bool, max_calls: int | None = None) -> None:
        self._tools = tools
        self._max_calls = max_calls
        self._held = ""  # not passed on yet: it may be the beginning of a tag
        self._skip_space = thinking is Thinking.OPEN
        self._state = {
            Thinking.OPEN: _State.REASONING,
            Thinking.POSSIBLE: _State.START,
            Thinking.NONE: _State.CONTENT,
        }[thinking]
        self._arguments = _JsonEnd()
        self._num_calls = 0
        self._searched = 0  # of `_held`, where no END_CALL begins
        self._pieces: list[Piece] = []

    @property
    def num_calls(self) -> int:
        """Tool calls passed on so far."""
        limit = self._num_calls if self._max_calls is None else self._max_calls
        return min(self._num_calls, limit)

    def feed(self, text: str) -> list[Piece]:
        """The parts that are sure after `text` has come."""
        self._held += text
        while self._advance():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back, the answer having ended."""
        text, self._held = self._held, ""
        if self._state is _State.REASONING:
            self._emit(Reasoning(text.rstrip()))
        elif self._state is _State.CALL_HEAD:  # cut off before its name was known
            self._emit(Content(CALL + text))
        elif self._state in (_State.START, _State.CONTENT):
            self._emit(Content(text.lstrip() if self._skip_space else text))
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _emit(self, piece: Piece) -> None:
        if isinstance(piece, CallStart | CallArguments):
            if self._max_calls is not None and piece.index >= self._max_calls:
                return
        elif not piece.text:
            return
        self._pieces.append(piece)

    def _advance(self) -> bool:
        """One move of the machine; False when it needs more text."""
        if self._skip_space:
            self._held = self._held.lstrip()
            if not self._held:
                return False
            self._skip_space = False
        return _MOVES[self._state](self)

    def _start(self) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._enter(_State.REASONING, text[len(THINK) :], skip_space=True)
            return True
        if THINK.startswith(text):
            return False
        self._state = _State.CONTENT
        return True

    def _reasoning(self) -> bool:
        text, found, rest = self._held.partition(END_THINK)
        if found:
            self._emit(Reasoning(text.rstrip()))
            self._enter(_State.CONTENT, rest, skip_space=True)
            return True
        sure = _sure_length(text, END_THINK)
        self._emit(Reasoning(text[:sure]))
        self._held = text[sure:]
        return False

    def _content(self) -> bool:
        if not self._tools:
            self._emit(Content(self._held))
            self._held = ""
            return False
        text, found, rest = self._held.partition(CALL)
        if found:
            self._emit(Content(text.rstrip()))
            self._enter(_State.CALL_HEAD, rest)
            return True
        sure = _sure_length(text, CALL)
        self._emit(Content(text[:sure]))
        self._held = text[sure:]
        return False

    def _call_head(self) -> bool:
        head = _CALL_HEAD.match(self._held[:MAX_HEAD_LENGTH])
        if head:
            name = _load(head[1])
            if isinstance(name, str):
                self._begin_call(name)
                self._arguments = _JsonEnd()
                self._enter(_State.CALL_ARGUMENTS, self._held[head.end() :])
                return True
        end = self._held.find(END_CALL, self._searched)
        if end < 0:
            self._searched = max(0, len(self._held) - len(END_CALL))
            return False
        self._whole_call(self._held[:end])
        self._enter(_State.CONTENT, self._held[end + len(END_CALL) :], skip_space=True)
        return True

    def _whole_call(self, text: str) -> None:
        """A call in another order, or none at all: then it is content."""
        call = _load(text)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            self._emit(Content(CALL + text + END_CALL))
            return
        arguments = call.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self._begin_call(call["name"])
        self._emit(CallArguments(self._num_calls - 1, arguments))

    def _begin_call(self, name: str) -> None:
        self._emit(CallStart(self._num_calls, name))
        self._num_calls += 1

    def _call_arguments(self) -> bool:
        end = self._arguments.find(self._held)
        text = self._held if end is None else self._held[:end]
        if text:
            self._emit(CallArguments(self._num_calls - 1, text))
        self._held = self._held[len(text) :]
        if end is None:
            return False
        self._state = _State.CALL_TAIL
        return True

    def _call_tail(self) -> bool:
        _, found, rest = self._held.partition(END_CALL)
        if found:
            self._enter(_State.CONTENT, rest, skip_space=True)
            return True
        self._held = self._held[-len(END_CALL) :]  # of no more use than as the tag's beginning
        return False

    def _enter(self, state: _State, rest: str, skip_space: bool = False) -> None:
        self._state, self._held, self._skip_space = state, rest, skip_space
        self._searched = 0


_MOVES = {
    _State.START: AnswerParser._start,
    _State.REASONING: AnswerParser._reasoning,
    _State.CONTENT: AnswerParser._content,
    _State.CALL_HEAD: AnswerParser._call_head,
    _State.CALL_ARGUMENTS: AnswerParser._call_arguments,
    _State.CALL_TAIL: AnswerParser._call_tail,
}


class _JsonEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """The index in `text` after the object's last brace; None if it goes on."""
        for i, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def _sure_length(text: str, tag: str) -> int:
    """How much of `text` cannot be part of `tag`, or of the whitespace before it."""
    sure = len(text)
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            sure -= length
            break
    return len(text[:sure].rstrip())


def _load(text: str) -> object:
    """JSON's value, or None where it is no JSON."""
    try:
        return json.loads(text, strict=False)  # models write line breaks inside strings
    except (ValueError, RecursionError):
        return None
