"""`tpllm serve`: a model behind an OpenAI-compatible HTTP server."""

from argparse import Namespace

from tpllm.cli.command import (
    Commands,
    add_command,
    add_engine_flags,
    engine_settings,
    phase_printer,
)
from tpllm.cli.options import add_flags, given_flags
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
    # the server itself reports when it is ready
    engine = {**given.values, "on_phase": phase_printer(args.quiet)}
    with given.named_in_errors(), server.named_in_errors():
        return serve(engine.pop("model", None), engine, settings)
