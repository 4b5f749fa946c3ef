"""Parse an assistant's text into reasoning, content and tool calls while it arrives.

Models write `<think>...</think>` before their answer, and call a tool by an object of its name and
arguments after a tag (`answer_formats.py`). Whitespace next to these tags belongs to them. A tag
that begins no reasoning and no call is content, and so is the whitespace next to it.
The result does not depend on how the text is divided into pieces.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator

from tpllm.server.answer_formats import HERMES, ToolFormat
from tpllm.server.answer_pieces import (
    END_THINK,
    THINK,
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
    Thinking,
)
from tpllm.server.json_scanner import SPACE, JsonScanner
from tpllm.text.stop_strings import num_undecided

# A long text is parsed in slices, since removing its front repeatedly copies the rest.
SLICE_LENGTH = 4096
# A call with its name first, up to the brace that opens the arguments. In this order the arguments
# can be streamed.
_NAME = re.compile(r'[\s\[]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)
# Mistral's call by a name before its arguments, up to their brace, and how its text may begin
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_NAMED_SO_FAR = re.compile(r"[\s\w.\[\]-]*")
_MAX_NAMED = 512  # characters


class AnswerParser:
    """Takes an answer's text in pieces of any size, and returns each part once it is certain.

    Args:
        thinking: whether the text may have reasoning
        tools: the format of the tool calls that the text may have; None for a text without
        max_calls: further calls are left out; None keeps all
        only_calls: the answer consists of tool calls, so a truncated call is not content
    """

    def __init__(
        self,
        thinking: Thinking,
        tools: ToolFormat | None,
        max_calls: int | None = None,
        only_calls: bool = False,
    ) -> None:
        self._has_tools = tools is not None
        self._format = tools or HERMES
        self._max_calls = max_calls
        self._only_calls = only_calls
        self._unread: deque[str] = deque()  # slices of text that are not parsed yet
        self._held = ""  # text that is being parsed; it may be the beginning of a tag
        self._unsure: list[str] = []  # whitespace that may belong to the next tag
        self._skip_space = thinking is Thinking.OPEN
        self._always_reasons = thinking is Thinking.ALWAYS
        is_bare = self._has_tools and self._format.is_bare
        self._first_content = self._bare_call if is_bare else self._content
        # the method that makes the next transition; it returns False if it needs more text
        self._state = {
            Thinking.OPEN: self._reasoning,
            Thinking.ALWAYS: self._start,
            Thinking.POSSIBLE: self._start,
            Thinking.NONE: self._first_content,
        }[thinking]
        self._opening = ""  # what stands before a call: a tag, a separator, or nothing
        self._call: list[str] = []  # text of a call after its opening
        self._is_named = False  # whether the call is a name before its arguments
        self._json = JsonScanner()
        self._may_open = False  # whether the arguments may begin at the next inner brace
        self._num_calls = 0
        self._pieces: list[Piece] = []

    @property
    def num_calls(self) -> int:
        """The number of tool calls so far."""
        limit = self._num_calls if self._max_calls is None else self._max_calls
        return min(self._num_calls, limit)

    def feed(self, text: str) -> list[Piece]:
        """Add `text`, and return the parts that are certain now."""
        self._unread.extend(_slices(text))
        self._read()
        return self._take()

    def finish(self, is_cut: bool = False) -> list[Piece]:
        """Return the parts that were held back, at the end of the answer.

        Args:
            is_cut: the answer is truncated, so a call that has begun is not content
        """
        while self._state in (self._begin_call, self._begin_named):
            if (is_cut and self._is_likely_call()) or self._only_calls:
                self._cut_call()
            else:
                self._no_call()
                self._read()
        in_start = self._state == self._start
        if self._state == self._reasoning or (in_start and self._always_reasons):
            self._emit(Reasoning(self._sure(self._held)))
        elif in_start or self._state in (self._bare_call, self._content):
            self._emit(Content(self._sure(self._held)))
        self._held = ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _sure(self, text: str) -> str:
        """Return the whitespace that was unsure, followed by `text`."""
        self._unsure.append(text)
        text = "".join(self._unsure)
        self._unsure.clear()
        return text

    def _emit(self, piece: Piece) -> None:
        if isinstance(piece, CallStart | CallArguments):
            if self._max_calls is not None and piece.index >= self._max_calls:
                return
        elif not piece.text or (self._only_calls and isinstance(piece, Content)):
            return
        self._pieces.append(piece)

    def _read(self) -> None:
        while self._unread:
            self._held += self._unread.popleft()
            while self._advance():
                pass

    def _advance(self) -> bool:
        """Make one transition, as `_state` does."""
        if self._skip_space:
            self._held = self._held.lstrip()
            if not self._held:
                return False
            self._skip_space = False
        return self._state()

    def _enter(self, state: Callable[[], bool], rest: str, skip_space: bool = False) -> None:
        self._state, self._held, self._skip_space = state, rest, skip_space

    def _pass_on(self, text: str, kind: type[Reasoning] | type[Content]) -> None:
        """Emit a text without its trailing whitespace, which may belong to a tag."""
        body = text.rstrip()
        if body:
            self._emit(kind(self._sure(body)))
        self._unsure.append(text[len(body) :])

    def _start(self) -> bool:
        text = self._held.lstrip()
        self._unsure.append(self._held[: len(self._held) - len(text)])
        self._held = text
        if text.startswith(THINK):
            self._unsure.clear()
            self._enter(self._reasoning, text[len(THINK) :], skip_space=True)
            return True
        if THINK.startswith(text):
            return False
        self._state = self._reasoning if self._always_reasons else self._first_content
        return True

    def _reasoning(self) -> bool:
        text, found, rest = self._held.partition(END_THINK)
        if found:
            self._pass_on(text, Reasoning)
            self._unsure.clear()
            self._enter(self._first_content, rest, skip_space=True)
            return True
        sure = len(text) - num_undecided(text, [END_THINK])
        self._pass_on(text[:sure], Reasoning)
        self._held = text[sure:]
        return False

    def _bare_call(self) -> bool:
        """At the beginning of an answer, which may be a call without a tag."""
        text = self._held.lstrip()
        self._unsure.append(self._held[: len(self._held) - len(text)])
        self._held = text
        if not text:
            return False
        if text.startswith("{"):
            self._open_call("", text)
        else:
            self._state = self._content
        return True

    def _content(self) -> bool:
        if not self._has_tools:
            self._emit(Content(self._sure(self._held)))
            self._held = ""
            return False
        tag = self._format.tag
        text, found, rest = self._held.partition(tag)
        sure = len(text) - (0 if found else num_undecided(text, [tag]))
        self._pass_on(text[:sure], Content)
        if not found:
            self._held = text[sure:]
            return False
        self._open_call(tag, rest)
        if self._format.has_names:
            self._state = self._begin_named
        return True

    def _open_call(self, opening: str, rest: str) -> None:
        self._opening, self._is_named = opening, False
        self._call, self._json, self._may_open = [], JsonScanner(), True
        self._enter(self._begin_call, rest)

    def _begin_named(self) -> bool:
        """After a tag that may begin a list of calls, an object, or a name before its arguments."""
        text = self._held.lstrip()
        self._call.append(self._held[: len(self._held) - len(text)])
        self._held = text
        if not text:
            return False
        if text[0] in "[{":
            rest = text.removeprefix("[")
            self._call.append(text[: len(text) - len(rest)])
            self._enter(self._begin_call, rest)
            return True
        named = _NAMED.match(text)
        if named and named.end() <= _MAX_NAMED:
            self._start_call(named[1])
            self._is_named = True
            self._json.follow("{")  # as if the arguments were in an object
            self._enter(self._arguments, text[named.end() :])
            return True
        may_be_named = len(text) <= _MAX_NAMED and _NAMED_SO_FAR.fullmatch(text)
        return False if may_be_named else self._no_call()

    def _begin_call(self) -> bool:
        """After a tag that may begin a call: scan the object up to its arguments, or to its end."""
        for i, char in enumerate(self._held):
            if char == "{" and self._json.depth == 1 and not self._json.in_string:
                if self._may_open and self._begin_arguments(i):
                    return True
                self._may_open = False
            if not self._json.follow(char):
                return self._no_call()
            if self._json.depth == 0 and char == "}":
                return self._whole_call(i + 1)
        self._call.append(self._held)
        self._held = ""
        return False

    def _begin_arguments(self, brace: int) -> bool:
        """Begin the call, and return True, if its arguments begin at this index."""
        text = "".join([*self._call, self._held[:brace]])
        named = _NAME.match(text)
        if not named or _dense(text[named.end() :]) not in self._before_arguments():
            return False
        if not self._start_named(named):
            return False
        self._enter(self._arguments, self._held[brace:])
        return True

    def _whole_call(self, end: int) -> bool:
        """Emit a call with another key order, which ends at this index, if it is a call."""
        call = _load("".join([*self._call, self._held[:end]]).lstrip(SPACE + "["))
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return self._no_call()
        keys = [key for key in self._format.arguments if key in call]
        if not (keys or self._opening):  # an answer may be an object that has a name
            return self._no_call()
        arguments = (call[keys[0]] if keys else None) or {}
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self._start_call(call["name"])
        self._emit(CallArguments(self._num_calls - 1, arguments))
        self._enter(self._after_call, self._held[end:])
        return True

    def _no_call(self) -> bool:
        """Emit the tag as content, and parse the text after it again.

        This is fast for any number of tags. Within an object a tag can only occur in a string, so
        no character is scanned for more than two objects.
        """
        self._unread.extendleft(reversed([*self._call, self._held]))
        self._emit(Content(self._sure(self._opening)))
        self._enter(self._content, "")
        return False

    def _before_arguments(self) -> list[str]:
        """Return the possible texts between name and arguments, without whitespace."""
        return [f',"{key}":' for key in self._format.arguments]

    def _is_likely_call(self) -> bool:
        """Whether a truncated object is a call: without a tag, only if its name stands in it."""
        text = "".join(self._call)
        named = _NAME.match(text)
        rest = _dense(text[named.end() :]) if named else ""
        may_go_on = any(each.startswith(rest) for each in self._before_arguments())
        return bool(self._opening) or (named is not None and may_go_on)

    def _cut_call(self) -> None:
        """End a call that is truncated before its arguments."""
        named = _NAME.match("".join(self._call))
        if named:
            self._start_named(named)
        self._unsure.clear()
        self._enter(self._after_call, "")

    def _start_named(self, named: re.Match[str]) -> bool:
        name = _load(named[1])
        if isinstance(name, str):
            self._start_call(name)
        return isinstance(name, str)

    def _start_call(self, name: str) -> None:
        self._unsure.clear()
        self._emit(CallStart(self._num_calls, name))
        self._num_calls += 1

    def _arguments(self) -> bool:
        text, passed, end = self._held, [], self._format.end
        for i, char in enumerate(text):
            in_string = self._json.in_string
            if char == end[:1] and not in_string and end.startswith(text[i : i + len(end)]):
                break  # the model may have forgotten a bracket
            self._json.follow(char)
            # models write line breaks in strings, which JSON must escape
            passed.append(json.dumps(char)[1:-1] if in_string and char < " " else char)
            if self._json.depth == 1:
                self._state = self._after_call if self._is_named else self._tail
                break
        self._held = text[len(passed) :]
        if passed:
            self._emit(CallArguments(self._num_calls - 1, "".join(passed)))
        if end and self._held.startswith(end):
            self._state = self._after_call
        return self._state != self._arguments

    def _tail(self) -> bool:
        """Skip the text between the arguments and the end of the call's object."""
        for i, char in enumerate(self._held):
            fits = self._json.follow(char)
            if not fits or self._json.depth == 0:
                end = i + 1 if fits else i
                self._enter(self._after_call, self._held[end:])
                return True
        self._held = ""
        return False

    def _after_call(self) -> bool:
        """Skip the closing tag, or the brackets of a list, or go on with the next call."""
        end, separator = self._format.end, self._format.separator
        rest = self._held.lstrip(SPACE + "]}")  # some models write too many closing brackets
        if end:
            self._unsure.append(self._held[: len(self._held) - len(rest)])
        self._held = rest
        if end and rest.startswith(end):
            self._unsure.clear()
            self._enter(self._content, rest[len(end) :], skip_space=True)
            return True
        if end.startswith(rest):
            return False
        if separator and rest.startswith(separator):
            self._open_call(separator, rest[len(separator) :])
            return True
        self._state = self._content
        return True


def _slices(text: str) -> Iterator[str]:
    return (text[i : i + SLICE_LENGTH] for i in range(0, len(text), SLICE_LENGTH))


def _dense(text: str) -> str:
    return "".join(text.split())


def _load(text: str) -> object:
    """Return the value of a JSON text, or None if it is not valid JSON."""
    try:
        return json.loads(text, strict=False)  # models write line breaks inside strings
    except (ValueError, RecursionError):
        return None
