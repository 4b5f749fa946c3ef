"""Shared by all commands: how a command is declared, and how it starts its engine."""

import sys
import time
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
from tpllm.cli.options import add_flags, given_flags
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
    """Add a command and return its parser; `run(args)` returns the exit code."""
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
    """Add a command that has subcommands, and return where to add these."""
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
    """Add flags for every engine setting, and --config for a file of settings.

    Args:
        positional: whether MODEL may be given without its flag
        starts: whether the command starts an engine by `engine`, so that it takes --quiet
        leave_out: settings without a flag
        defaults: the command's own defaults
    """
    if positional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help="the same as --model")
    if starts:
        parser.add_argument(
            "--quiet", action="store_true", help="do not report the start on stderr"
        )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file of settings (default: the file that TPLLM_CONFIG names)",
    )
    add_flags(parser, Settings, "engine", leave_out, defaults)


def engine_settings(args: Namespace, defaults: Mapping[str, object] = NO_DEFAULTS) -> Given:
    """Return the engine settings from every source, each checked by itself.

    Raises:
        ValueError: one is wrong, or the model is given twice; nothing has been started.
    """
    flags = given_flags(args, Settings)
    if (model := getattr(args, "model", None)) is not None:
        if "model" in flags:
            raise ValueError(f"model is given twice: {model!r} and {flags['model']!r}")
        flags["model"] = model
    given = collect(Settings, flags, args.config)
    given.values.update({**defaults, **given.values})
    with given.named_in_errors():
        Settings(**given.values)
    return given


@contextmanager
def engine(args: Namespace, given: Given) -> Iterator["tpllm.LLM"]:
    """Run an engine within the block, and report the phases of its start on stderr."""
    on_phase = phase_printer(args.quiet)
    with given.named_in_errors():
        llm = tpllm.LLM(**given.values, on_phase=on_phase)
    on_phase(0, "ready")
    with llm:
        yield llm


def phase_printer(quiet: bool) -> Callable[[int, str], None]:
    """Return an `on_phase(rank, phase)` that prints each phase of a start on stderr.

    All ranks go through the same phases; a phase is printed when the first rank begins it, with the
    seconds since this call.
    """
    begin = time.perf_counter()
    printed: set[str] = set()

    def on_phase(rank: int, phase: str) -> None:
        if not quiet and phase not in printed:
            printed.add(phase)
            seconds = time.perf_counter() - begin
            print(f"tpllm: {seconds:5.1f} s  {phase}", file=sys.stderr, flush=True)

    on_phase(0, "starting")
    return on_phase
