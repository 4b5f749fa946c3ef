"""The parts of an assistant's answer, and whether the answer may begin with reasoning."""

from dataclasses import dataclass
from enum import Enum

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a tool call. Calls count from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Reasoning | Content | CallStart | CallArguments


class Thinking(Enum):
    """Whether an answer has reasoning, as far as the end of its prompt decides."""

    OPEN = "the prompt ends with <think>, so the answer begins with reasoning"
    ALWAYS = "the answer begins with reasoning, which may begin with <think>"
    POSSIBLE = "an answer that begins with <think> has reasoning"
    NONE = "the whole answer is content"

    @classmethod
    def after(cls, prompt: str, always: bool = False) -> "Thinking":
        """Return how the answer to a rendered prompt begins; `always` is ALWAYS for POSSIBLE."""
        end = prompt[-64:].rstrip()
        if end.endswith(THINK):
            return cls.OPEN
        if end.endswith(END_THINK):
            return cls.NONE
        return cls.ALWAYS if always else cls.POSSIBLE
