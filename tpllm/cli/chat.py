"""`tpllm chat`: a conversation in the terminal, or line by line through pipes."""

import sys
from argparse import Namespace
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import tpllm
from tpllm.cli.command import Commands, add_command, add_engine_flags, engine, engine_settings
from tpllm.cli.options import add_flags, given_flags
from tpllm.cli.sampling import LEFT_OUT, chat_prompt, stream
from tpllm.sampling_params import SamplingParams

# Defaults from the model's generation_config.json, as the help shows them.
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
DEFAULTS = dict.fromkeys(RECOMMENDED, "what the model recommends") | {"max_tokens": "none"}
# The command shows one answer at a time, as text.
OF_NO_USE = ("n", "logprobs", "prompt_logprobs", "detokenize")

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt; without TEXT, remove it
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "chat",
        run,
        "talk with a model in the terminal",
        "tpllm chat Qwen/Qwen3-8B --tensor-parallel-size 2",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    add_flags(parser, SamplingParams, "sampling", OF_NO_USE, DEFAULTS)
    add_engine_flags(parser, leave_out=LEFT_OUT)


def run(args: Namespace) -> int:
    asked: dict[str, Any] = {"max_tokens": None} | given_flags(args, SamplingParams)
    SamplingParams(**asked)  # a wrong value is refused before the engine starts
    given = engine_settings(args)
    with engine(args, given) as llm:
        params = replace(llm.get_default_sampling_params(), **asked)
        conversation = Conversation(llm, params, args.system)
        with given.named_in_errors():  # a model without a chat template is refused
            chat_prompt(llm, [{"role": "user", "content": "?"}])
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() line editing and a history)

            print(HELP)
        while (line := _read_line()) is not None:
            if not conversation.take(line):
                break
    return 0


class Conversation:
    """The messages of a conversation, and the engine that answers.

    Args:
        llm: a running engine with a chat template
        params: sampling parameters of the answers
        system: the system prompt
    """

    def __init__(self, llm: "tpllm.LLM", params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self.system = system
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Answer a line, or run the command in it; return False at the end of the session."""
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
        """Print an answer while it comes; after Ctrl-C its printed part is kept as the answer.

        A message that no longer fits into the context is dropped.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        stopped = False
        try:
            with closing(
                stream(self._llm, chat_prompt(self._llm, system + messages), self._params)
            ) as s:
                for output in s:
                    answer += output.outputs[0].text
                    print(output.outputs[0].text, end="", flush=True)
        except ValueError as error:
            print(f"tpllm: error: {error}; /reset forgets the conversation", file=sys.stderr)
            return
        except KeyboardInterrupt:
            if self._llm.closed:  # a second Ctrl-C, or one in the middle of a step
                raise
            stopped = True
        print(" [stopped]" if stopped else "", flush=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """Return the next line; None at the end. At a terminal Ctrl-C drops the typed text."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    while True:
        with suppress(KeyboardInterrupt):  # Ctrl-C again, while the first is handled
            try:
                return input("> ")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
