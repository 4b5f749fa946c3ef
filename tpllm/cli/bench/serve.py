"""`tpllm bench serve`: sends load to any OpenAI-compatible server, and measures its latencies.

A run sends requests as a Poisson process of a given rate, with a limit on those at one time.
Several rates give a curve. Each run has new prompts, so that no prefix cache helps it.
"""

import asyncio
import json
import math
import os
from argparse import ArgumentTypeError, Namespace
from typing import Any

import tpllm
from tpllm.cli.command import Commands, add_command
from tpllm.config.resources import allow_many_connections


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        run,
        "load an OpenAI-compatible server, and measure latencies and throughput",
        "tpllm bench serve --request-rate 1 2 4 8 --goodput ttft:200 tpot:50",
    )
    _add_server_flags(parser.add_argument_group("server"))
    _add_load_flags(parser.add_argument_group("load"))
    _add_request_flags(parser.add_argument_group("requests"))


def _add_server_flags(group: Any) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL")
    group.add_argument("--model", help="as the server calls it (default: its first)")
    group.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    group.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        metavar="KEY",
        help="sent as a bearer token (default: OPENAI_API_KEY)",
    )
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="counts tokens (default: the server's /tokenize)"
    )


def _add_load_flags(group: Any) -> None:
    group.add_argument(
        "--request-rate",
        type=_rate,
        nargs="+",
        default=[math.inf],
        metavar="R",
        help="requests per second, arriving at random; inf (default) sends all at once",
    )
    group.add_argument(
        "--max-concurrency",
        type=_positive,
        nargs="+",
        default=[None],
        metavar="N",
        help="most requests at one time (default: any number)",
    )
    group.add_argument(
        "--num-prompts", type=_positive, default=200, metavar="N", help="a run (200)"
    )
    group.add_argument("--num-warmups", type=_positive, default=4, metavar="N", help="untimed (4)")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (0)"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep all of these: ttft, tpot, e2el in milliseconds",
    )
    group.add_argument(
        "--timeout-s", type=float, default=3600.0, metavar="S", help="for one request (3600)"
    )


def _add_request_flags(group: Any) -> None:
    for name, default in (("input", (512, 512)), ("output", (128, 128))):
        group.add_argument(
            f"--{name}-len",
            type=_length,
            default=default,
            metavar="N|LO-HI",
            help=f"tokens of each {name}, uniformly at random from a range ({default[0]})",
        )
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(0)")
    group.add_argument(
        "--respect-eos",
        action="store_true",
        help="let the model end early; do not send ignore_eos, which OpenAI itself lacks",
    )
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="more for each request"
    )


def run(args: Namespace) -> int:
    from tpllm.cli.bench.sweep import sweep  # other commands need no HTTP client

    allow_many_connections()
    runs = asyncio.run(sweep(args))
    given = {k: v for k, v in vars(args).items() if k not in ("run", "api_key", "command", "debug")}
    print(
        json.dumps({"tpllm": tpllm.__version__, "arguments": _plain(given), "runs": _plain(runs)})
    )
    return 0 if all(figures["completed"] for figures in runs) else 1


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise ArgumentTypeError(f"{text!r} is not a rate above 0, or inf")
    return rate


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _length(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    lowest, highest = _positive(low), _positive(high or low)
    if lowest > highest:
        raise ArgumentTypeError(f"{text!r} is a range that ends before it begins")
    return lowest, highest


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _plain(value: Any) -> Any:
    """Return the value with "inf" for infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "inf" if value == math.inf else value
