"""`tpllm chat`, line by line through pipes and in a terminal, up to the engine."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.scripts import ROOT
from tpllm import RequestOutputKind, SamplingParams
from tpllm.cli import chat, main

DEADLINE_S = 120.0


@pytest.fixture
def say(llm, monkeypatch, capsys):
    """Run a session of these lines; returns its exit code, stdout and stderr."""

    def run(*lines: str, words: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", "--quiet", *words])
        return code, *capsys.readouterr()

    return run


def test_each_line_is_answered_and_remembered(llm, say):
    code, out, err = say("hi", "", "and you?")
    assert (code, err) == (0, "")
    assert out == "[user: hi]\n[user: hi][assistant: [user: hi]][user: and you?]\n"
    assert llm.made["closed"]


def test_answers_are_drawn_as_the_model_recommends_unless_told_otherwise(llm, say):
    say("hi", words=("--top-p", "0.5", "--temperature", "0.1"))
    assert llm.made["params"] == SamplingParams(
        temperature=0.1,
        top_p=0.5,
        top_k=20,
        max_tokens=None,
        output_kind=RequestOutputKind.DELTA,
    )


def test_a_wrong_sampling_value_is_refused_before_the_engine_starts(llm, say):
    code, _, err = say("hi", words=("--top-p", "2"))
    assert (code, llm.made) == (2, {})
    assert err.startswith("tpllm: error: top_p=2.0 must be")


@pytest.mark.parametrize("words", [("abc", "--quiet"), ("--quiet", "abc"), ("--model", "abc")])
def test_the_model_may_come_without_its_flag(llm, say, words):
    assert say("hi", words=words)[0] == 0
    assert llm.made["settings"] == {"model": "abc"}


@pytest.mark.parametrize("words", [("abc", "--model", "b"), ("--model", "b", "abc")])
def test_the_model_is_given_once(llm, say, words):
    code, _, err = say("hi", words=words)
    assert (code, llm.made) == (2, {})
    assert err == "tpllm: error: model is given twice: 'abc' and 'b'\n"


def test_reset_forgets_and_exit_ends(say):
    _, out, _ = say("a", "/reset", "b", "/exit", "c")
    assert out == "[user: a]\n[user: b]\n"


def test_the_system_prompt_can_change_and_outlives_a_reset(say):
    lines = ("a", "/reset", "/system  be brief ", "b", "/reset", "/system", "c")
    _, out, _ = say(*lines, words=("--system", "be kind"))
    assert out == "[system: be kind][user: a]\n[system: be brief][user: b]\n[user: c]\n"


def test_an_unknown_command_shows_those_there_are(say):
    _, out, _ = say("/resett")
    assert "/reset " in out and "/system TEXT" in out and "/exit" in out


def test_a_message_that_does_not_fit_is_not_remembered(llm, say, monkeypatch):
    take = llm._take

    def refuse(self, prompt, params):
        text = take(self, prompt, params)
        if "too long" in text:
            raise ValueError("the prompt has 5000 tokens")
        return text

    monkeypatch.setattr(llm, "_take", refuse)
    code, out, err = say("hi", "too long", "again")
    assert code == 0
    assert "too long" not in out and out.endswith("[user: again]\n")
    assert err == "tpllm: error: the prompt has 5000 tokens; /reset forgets the conversation\n"


def test_a_model_without_a_chat_template_is_refused(llm, say):
    llm.has_chat_template = False
    code, out, err = say("hi")
    assert (code, out, err) == (2, "", "tpllm: error: there is no chat template\n")


def test_the_model_can_be_named_without_a_flag(llm, say):
    say(words=("folder", "--seed", "3", "--temperature", "0"))
    assert llm.made["settings"] == {"model": "folder"}
    say("hi", words=("--seed", "3", "--temperature", "0"))
    assert (llm.made["params"].seed, llm.made["params"].temperature) == (3, 0.0)


# ---- in a terminal -----------------------------------------------------------------------------

OWN_TERMINAL = """
import os, signal
os.close(os.open(os.ttyname(0), os.O_RDWR))  # it becomes ours: Ctrl-C goes to this program
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

SESSION = """
import sys

import tpllm
from tests.cli.stand_in import StandIn
from tpllm.cli import main

class LLM(StandIn):
    gap_s = 0.1  # for the first answer, which would take most of a minute

    def generate_stream(self, *args):
        try:
            yield from super().generate_stream(*args)
        finally:
            self.gap_s = 0.0

tpllm.LLM = LLM
sys.exit(main(["chat", "--quiet"]))
"""


class Terminal:
    """A program in a terminal of its own: what it shows, and what is typed into it."""

    def __init__(self, code: str) -> None:
        self._terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str) -> str:
        """Everything shown since the last wait, `text` at its end."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was never shown: {self.shown!r}"
            try:
                self._look(0.1)
            except OSError:  # the program has ended
                raise AssertionError(f"{text!r} was never shown: {self.shown!r}") from None
        before, text, self.shown = self.shown.partition(text)
        return before + text

    def _look(self, patience_s: float) -> None:
        if select.select([self._terminal], [], [], patience_s)[0]:
            self.shown += os.read(self._terminal, 4096).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def run_in_terminal() -> Iterator[Callable[[str], Terminal]]:
    """Starts a program in a terminal; it ends with the test."""
    with ExitStack() as stack:

        def run(code: str) -> Terminal:
            terminal = Terminal(OWN_TERMINAL + code)
            stack.callback(terminal.close)
            return terminal

        yield run


def test_a_real_engine_stops_its_answer_at_ctrl_c_and_gives_the_next(run_in_terminal):
    """Answers would take seconds each: end tokens are held back."""
    words = ["chat", "--device", "cpu", "--min-tokens", "1500", "--temperature", "0"]
    terminal = run_in_terminal(f"import sys; from tpllm.cli import main; sys.exit(main({words}))")
    terminal.wait_for("loading weights")
    terminal.wait_for("  ready")
    for _ in range(2):
        terminal.wait_for("> ")
        terminal.type("What is 348 + 44?\n")
        terminal.wait_for("?\r\n392")
        terminal.type("\x03")
        terminal.wait_for(" [stopped]\r\n")
        terminal.wait_for("> ")
        terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(DEADLINE_S) == 0


def test_ctrl_c_at_the_prompt_drops_the_line_and_a_second_one_does_no_more(monkeypatch):
    """Not in a terminal: readline may notice a signal at the next key only."""
    pressed = iter([True, False])

    def read(prompt: str) -> str:
        if next(pressed):
            raise KeyboardInterrupt
        return "go on"

    def write() -> None:
        raise KeyboardInterrupt  # the second one, while the first is answered

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "print", write, raising=False)
    assert chat._read_line() == "go on"


def test_ctrl_c_stops_the_answer_and_not_the_session(run_in_terminal):
    terminal = run_in_terminal(SESSION)
    terminal.wait_for("Ctrl-C stops an answer")
    terminal.wait_for("> ")
    terminal.type(" ".join(f"w{i}" for i in range(400)) + "\n")
    terminal.wait_for("w399\r\n")  # what was typed; then the answer comes, word by word
    terminal.wait_for("[user: w0 w1 w2")
    terminal.type("\x03")
    stopped = terminal.wait_for(" [stopped]\r\n")
    assert "w399" not in stopped
    terminal.wait_for("> ")
    terminal.type("go on\n")
    answer = terminal.wait_for("[user: go on]\r\n")
    assert "[assistant: [user: w0 w1 w2" in answer  # what came before Ctrl-C counts as said
    terminal.wait_for("> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.process.wait(DEADLINE_S) == 0
