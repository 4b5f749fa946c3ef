"""The program `tpllm`: text from a model, from the command line.

    tpllm generate "What is 348 + 44?" --tensor-parallel-size 2

The answer goes to stdout. A user's mistake is one line on stderr and exit code 2; a worker that
dies gives its report and exit code 1.
"""

import os
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any, NoReturn

import tpllm

# What goes to LLM, under the same name. Absent unless given: LLM has the defaults.
ENGINE_SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"help": "local folder or Hugging Face id (default: the small model shipped inside)"},
    "tensor_parallel_size": {"type": int, "metavar": "N", "help": "processes, one per GPU"},
    "device": {"help": "auto, cuda or cpu"},
    "dtype": {"help": "auto, bfloat16, float16 or float32"},
    "max_model_len": {"type": int, "metavar": "N", "help": "most tokens of prompt and answer"},
    "load_format": {"help": "auto, or dummy for random weights"},
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        print(_generate(args), flush=True)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        _report(error)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at exit
        return 1
    except OSError as error:
        _report(error)
        return 1
    except tpllm.WorkerError as error:
        print(f"tpllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells report a program that Ctrl-C ended
    return 0


def _generate(args: Namespace) -> str:
    """The text that answers or, with --raw or without a chat template, continues the prompt."""
    params = tpllm.SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed
    )
    settings = {name: value for name, value in vars(args).items() if name in ENGINE_SETTINGS}
    with tpllm.LLM(**settings) as llm:
        if args.raw or not llm.get_tokenizer().has_chat_template:
            outputs = llm.generate([args.prompt], params, use_tqdm=False)
        else:
            message = {"role": "user", "content": args.prompt}
            outputs = llm.chat([message], params, use_tqdm=False)
        return outputs[0].outputs[0].text


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the whole usage first."""
        self.exit(2, f"tpllm: error: {message} (see {self.prog} --help)\n")


def _parser() -> ArgumentParser:
    parser = _Parser(prog="tpllm", description="Large language models across the GPUs of a machine")
    parser.add_argument("--version", action="version", version=f"tpllm {tpllm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="answer or continue a prompt")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument(
        "--raw", action="store_true", help="continue the prompt as text, without chat template"
    )
    generate.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens to generate (256)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    generate.add_argument("--seed", type=int, help="64-bit, for a temperature above 0")
    for name, options in ENGINE_SETTINGS.items():
        generate.add_argument(f"--{name.replace('_', '-')}", default=SUPPRESS, **options)
    return parser


def _report(error: Exception) -> None:
    print(f"tpllm: error: {' '.join(str(error).split())}", file=sys.stderr)  # always one line
