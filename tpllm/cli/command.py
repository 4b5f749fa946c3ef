"""What commands have in common: how one is declared, and how one gets its engine."""

import sys
from argparse import (
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
    _SubParsersAction,
)
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TypeAlias

import tpllm
from tpllm.cli.options import add_flags, add_positional, given_flags
from tpllm.cli.progress import StartupProgress
from tpllm.cli.sources import Given, collect
from tpllm.config.settings import Settings

Commands: TypeAlias = "_SubParsersAction[ArgumentParser]"  # argparse has no public name for it
NO_DEFAULTS: Mapping[str, object] = MappingProxyType({})


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[Namespace], int],
    summary: str,
    example: str,
) -> ArgumentParser:
    """A command's parser; `run(args)` returns the exit code."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{_sentence(summary)}\n\nExample:\n  {example}",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_group(commands: Commands, name: str, summary: str) -> Commands:
    """A word that has commands of its own."""
    parser = commands.add_parser(name, help=summary, description=_sentence(summary))
    return parser.add_subparsers(dest=f"{name}_command", required=True, metavar="COMMAND")


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def add_engine_flags(
    parser: ArgumentParser,
    *,
    positional: bool = True,
    starts: bool = True,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, object] = NO_DEFAULTS,
) -> None:
    """Flags for every engine setting, and where to find others.

    Args:
        positional: whether MODEL may be a word of its own
        starts: whether the command starts an engine by `engine`, which can be silent
        leave_out: settings that are of no use to it
        defaults: the command's own
    """
    if positional:
        add_positional(parser, Settings, "model")
    if starts:
        parser.add_argument("--quiet", action="store_true", help="tell nothing of the start")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file of settings (default: the one that TPLLM_CONFIG names)",
    )
    add_flags(parser, Settings, "engine", leave_out, defaults)


def engine_settings(args: Namespace, defaults: Mapping[str, object] = NO_DEFAULTS) -> Given:
    """The engine settings from every source, checked each by itself.

    Raises:
        ValueError: one is wrong; nothing has been started.
    """
    given = collect(Settings, given_flags(args, Settings), args.config)
    given.values.update({**defaults, **given.values})
    with given.named_in_errors():
        Settings(**given.values)
    return given


@contextmanager
def engine(args: Namespace, given: Given) -> Iterator["tpllm.LLM"]:
    """An engine for the duration; the phases of its start are told on stderr."""
    with StartupProgress(sys.stderr, quiet=args.quiet) as progress, given.named_in_errors():
        llm = tpllm.LLM(**given.values, on_phase=progress.on_phase)
    with llm:
        yield llm
