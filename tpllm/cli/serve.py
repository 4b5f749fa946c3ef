"""`tpllm serve`: a model behind an OpenAI-compatible HTTP server."""

import sys
from argparse import Namespace

from tpllm.cli.command import Commands, add_command, add_engine_flags, engine_settings
from tpllm.cli.options import add_flags, given_flags
from tpllm.cli.progress import StartupProgress
from tpllm.cli.sources import collect
from tpllm.server import ServerSettings

LEFT_OUT = ("skip_tokenizer_init",)  # requests to a server are text


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        "serve a model over HTTP, with OpenAI's API",
        "tpllm serve Qwen/Qwen3-8B --tensor-parallel-size 2 --port 8000",
    )
    add_flags(parser, ServerSettings, "server")
    add_engine_flags(parser, leave_out=LEFT_OUT)


def run(args: Namespace) -> int:
    """Serve until a signal, and return the exit code of the server."""
    given = engine_settings(args)
    server = collect(ServerSettings, given_flags(args, ServerSettings), args.config)
    with server.named_in_errors():
        settings = ServerSettings(**server.values)
    try:
        from tpllm.server import run as serve  # needs the packages of the extra `server`
    except ImportError as error:
        raise ValueError(str(error)) from error
    progress = StartupProgress(sys.stderr, quiet=args.quiet)
    progress.write("starting")  # the server itself reports when it is ready
    engine = {**given.values, "on_phase": progress.on_phase}
    with given.named_in_errors(), server.named_in_errors():
        return serve(engine.pop("model", None), engine, settings)
