"""`tpllm chat`: a conversation in the terminal, or line by line through pipes."""

import sys
from argparse import Namespace
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from tpllm.cli.command import Commands, add_command, add_engine_flags, engine, engine_settings
from tpllm.cli.options import given_flags
from tpllm.cli.sampling import (
    LEFT_OUT,
    add_sampling_flags,
    chat_prompt,
    stream,
)
from tpllm.llm import LLM
from tpllm.sampling_params import SamplingParams

# As the help shows them: from the model's generation_config.json, where it has one.
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DEFAULTS = dict.fromkeys(RECOMMENDED, "what the model recommends") | {"max_tokens": "none"}
# One answer is shown as it comes, as text.
OF_NO_USE = ("n", "logprobs", "prompt_logprobs", "detokenize")

HELP = """\
/reset         forget the conversation
/system TEXT   what the model is told before it; without TEXT, nothing
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "chat",
        run,
        "talk with a model in the terminal",
        "tpllm chat Qwen/Qwen3-8B --tensor-parallel-size 2",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    add_sampling_flags(parser, DEFAULTS, OF_NO_USE)
    add_engine_flags(parser, leave_out=LEFT_OUT)


def run(args: Namespace) -> int:
    asked: dict[str, Any] = {"max_tokens": None} | given_flags(args, SamplingParams)
    SamplingParams(**asked)  # refused, if it is, before the engine starts
    given = engine_settings(args)
    with engine(args, given) as llm:
        params = replace(llm.get_default_sampling_params(), **asked)
        conversation = Conversation(llm, params, args.system)
        with given.named_in_errors():  # a model without a chat template is of no use here
            chat_prompt(llm, [{"role": "user", "content": "?"}])
        if sys.stdin.isatty():
            import readline  # noqa: F401  (input() edits lines and remembers them with it)

            print(HELP)
        while (line := _read_line()) is not None:
            if not conversation.take(line):
                break
    return 0


class Conversation:
    """What has been said, and the engine that answers.

    Args:
        llm: a running engine with a chat template
        params: how answers are drawn
        system: what the model is told beforehand
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self.system = system
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Answer a line, or obey it where it begins with a slash; False ends the session."""
        words = line.strip()
        command, _, rest = words.partition(" ")
        if not words:
            pass
        elif command == "/exit":
            return False
        elif command == "/reset":
            self.messages.clear()
        elif command == "/system":
            self.system = rest.strip() or None
        elif command.startswith("/"):
            print(HELP)
        else:
            self._answer(words)
        return True

    def _answer(self, text: str) -> None:
        """Print an answer while it comes; what Ctrl-C leaves of it counts as said.

        A message that cannot be answered, since it no longer fits, is as if it had not been said.
        """
        told = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        said = ""
        stopped = False
        try:
            with closing(
                stream(self._llm, chat_prompt(self._llm, told + asked), self._params)
            ) as s:
                for output in s:
                    said += output.outputs[0].text
                    print(output.outputs[0].text, end="", flush=True)
        except ValueError as error:
            print(f"tpllm: error: {error}; /reset forgets the conversation", file=sys.stderr)
            return
        except KeyboardInterrupt:
            if self._llm.coordinator.closed:  # it came twice, or in the middle of a step
                raise
            stopped = True
        print(" [stopped]" if stopped else "", flush=True)
        self.messages = [*asked, {"role": "assistant", "content": said}]


def _read_line() -> str | None:
    """The next line; None at the end. At a terminal Ctrl-C drops what has been typed."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    while True:
        with suppress(KeyboardInterrupt):  # a second one, while the first is answered
            try:
                return input("> ")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
