"""Sweep: one run of load for each rate and each limit, with prompts of its own."""

import random
import sys
from argparse import Namespace
from itertools import product
from typing import Any

from tqdm import tqdm

from tpllm.cli.bench.client import Server
from tpllm.cli.bench.load import Job, arrival_times, run_load
from tpllm.cli.bench.prompts import random_prompt, single_token_words, token_counter
from tpllm.cli.bench.report import parse_objectives, print_curve, print_run, summarize

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


async def sweep(args: Namespace) -> list[dict[str, Any]]:
    """Return the figures of a run for each rate and limit of the command line; print them, too.

    Raises:
        ValueError: an argument is wrong.
        OSError: the server does not answer.
    """
    objectives = parse_objectives(args.goodput)
    server = Server(args.base_url, args.api_key)
    model = args.model or await _first_model(server)
    print(f"tpllm: {model} at {server.url}", file=sys.stderr)
    words = await single_token_words(token_counter(server, model, args.tokenizer))
    rng = random.Random(args.seed)
    await _warm_up(args, server, _jobs(args, model, words, args.num_warmups, rng))
    runs = []
    for rate, max_concurrency in product(args.request_rate, args.max_concurrency):
        jobs = _jobs(args, model, words, args.num_prompts, rng)
        arrivals = arrival_times(rate, len(jobs), args.seed)
        with tqdm(total=len(jobs), unit="request", leave=False, disable=None) as bar:
            load = await run_load(
                server, jobs, arrivals, max_concurrency, args.timeout_s, on_end=bar.update
            )
        figures = {"request_rate": rate, "max_concurrency": max_concurrency}
        figures |= summarize(load, objectives)
        limit = "" if max_concurrency is None else f", at most {max_concurrency} at once"
        print_run(f"{rate:g} requests per second{limit}", figures)
        runs.append(figures)
    if len(runs) > 1:
        print_curve(runs)
    return runs


async def _first_model(server: Server) -> str:
    answer = await server.call("GET", "/v1/models")
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise OSError(f"/v1/models of {server.url} names no model; give --model") from None


async def _warm_up(args: Namespace, server: Server, jobs: list[Job]) -> None:
    """Send a few requests at once.

    Raises:
        OSError: one failed, so the others would, too.
    """
    load = await run_load(server, jobs, [0.0] * len(jobs), timeout_s=args.timeout_s)
    for record in load.records:
        if record.error is not None:
            raise OSError(f"a request to {server.url} failed: {record.error}")


def _jobs(
    args: Namespace, model: str, words: list[str], num_jobs: int, rng: random.Random
) -> list[Job]:
    jobs = []
    for _ in range(num_jobs):
        num_in, num_out = rng.randint(*args.input_len), rng.randint(*args.output_len)
        text = random_prompt(words, num_in, rng)
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": num_out,
            "temperature": args.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if args.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if not args.respect_eos:
            body["ignore_eos"] = True
        jobs.append(Job(PATHS[args.endpoint], body | args.extra_body, num_in))
    return jobs
