"""The parts of an assistant's answer, and whether its prompt lets it begin with reasoning."""

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
