"""The program: its command line, its exit codes and its error messages.

    tpllm generate "What is 348 + 44?" --tensor-parallel-size 2

A user's mistake is one line on stderr and exit code 2. A worker that dies gives a report and exit
code 1. Ctrl-C gives exit code 130, as shells do. `--debug` shows the traceback as well.
"""

import os
import sys
import traceback
from argparse import ArgumentParser
from typing import NoReturn

import tpllm
from tpllm.cli import bench, chat, generate, info, serve

COMMANDS = (generate, chat, serve, bench, info)

USER_MISTAKES = (ValueError, FileNotFoundError, PermissionError)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at exit
        return 1
    except (*USER_MISTAKES, OSError, tpllm.WorkerError) as error:
        if args.debug:
            traceback.print_exc()
        report(error)
        return 2 if isinstance(error, USER_MISTAKES) else 1


def report(error: BaseException) -> None:
    """Print an error on stderr, in one line unless it is the report of a worker."""
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])
    if not isinstance(error, tpllm.WorkerError):  # which contains a traceback
        text = " ".join(text.split())
    print(f"tpllm: error: {text}", file=sys.stderr, flush=True)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line; argparse would print the whole usage first."""
        self.exit(2, f"tpllm: error: {message} (see {self.prog} --help)\n")


def _parser() -> ArgumentParser:
    parser = _Parser(prog="tpllm", description="Large language models across the GPUs of a machine")
    parser.add_argument("--version", action="version", version=f"tpllm {tpllm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
