"""Loads `tpllm serve` with request rates up to saturation, after the same work offline.

First 256 requests run at once through `LLM.generate`, then as 256 open streams of the server: the
difference is the cost of HTTP and text. Then requests arrive at random, at several rates. Latencies
grow until the rate exceeds what the GPU can serve, which memory bandwidth and matmuls bound. A
model without a tokenizer gets the shipped one, extended to the model's vocabulary with tokens of
random bytes, so that every id has a text.

Prints a table, then one JSON line.

    python launch/bench_server.py --model launch/configs/Qwen3-8B --load-format dummy --tp 2
"""

import argparse
import asyncio
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

from engine_flags import parse_with_engine_flags

from tpllm import LLM, SamplingParams
from tpllm.cli.bench.prompts import random_prompt, single_token_words
from tpllm.cli.bench.report import print_curve
from tpllm.cli.bench.workloads import environment
from tpllm.config.checkpoint import TOKENIZER_FILES, resolve_model

READY = re.compile(r"http://127\.0\.0\.1:\d+")


def with_tokenizer(model: str | None, folder: Path) -> str | None:
    """Return the model, or a copy of its config in `folder` with a tokenizer of its vocabulary."""
    source = resolve_model(model, weights=False)
    if any((source / name).exists() for name in TOKENIZER_FILES):
        return model
    shutil.copytree(source, folder, dirs_exist_ok=True)
    shipped = resolve_model(None)
    shutil.copy(shipped / "tokenizer_config.json", folder)
    tokenizer = json.loads((shipped / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    known = {*vocab, *(added["content"] for added in tokenizer["added_tokens"])}
    next_id = len(known)
    rng, pieces = random.Random(0), [piece for piece in vocab if len(piece) <= 4]
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    while next_id < size:
        pair = rng.choices(pieces, k=2)
        if (piece := "".join(pair)) not in known:
            known.add(piece)
            merges.append(pair)
            vocab[piece] = next_id
            next_id += 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def offline(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return output tokens per second of all streams' requests, submitted at once."""

    async def count(text: str) -> int:
        return len(llm.get_tokenizer().encode_batch([text], add_special_tokens=False)[0])

    def params(num_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)

    with LLM(**settings) as llm:
        words, rng = asyncio.run(single_token_words(count)), random.Random(0)
        prompts = [random_prompt(words, args.input_len, rng) for _ in range(args.streams)]
        llm.generate(prompts, params(8), use_tqdm=False)
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        llm.generate(prompts, params(args.stream_len), use_tqdm=False)
        seconds = time.perf_counter() - begin
        speed = round(args.streams * args.stream_len / seconds, 1)
        return {"output_tokens_per_s": speed, **environment(llm)}


class Server:
    """A `tpllm serve` process with these settings on a free port; SIGTERM ends it."""

    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        config = log.with_name("settings.yaml")
        config.write_text(json.dumps(settings))  # JSON is YAML
        flags = [sys.executable, "-m", "tpllm", "serve", "--port", "0", "--no-page"]
        flags += ["--config", str(config)]
        with log.open("w") as out:
            self._process = subprocess.Popen(flags, stdout=out, stderr=subprocess.STDOUT)
        while not (found := READY.search(log.read_text())):
            if self._process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        self.url = found.group()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)

    def load(self, num_prompts: int, output_len: int, *flags: str) -> dict[str, Any]:
        """Run `tpllm bench serve` and return the figures of its run."""
        command = [sys.executable, "-m", "tpllm", "bench", "serve", "--base-url", self.url]
        command += ["--num-prompts", str(num_prompts), "--output-len", str(output_len), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"tpllm bench serve failed:\n{done.stderr}")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["runs"][0]
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rates", nargs="+", default=["4", "8", "16", "24", "32", "40"])
    parser.add_argument("--seconds", type=float, default=8, help="duration of arrivals")
    parser.add_argument("--input-len", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--streams", type=int, default=256, help="open at once in the first run")
    parser.add_argument("--stream-len", type=int, default=512, metavar="TOKENS")
    args = parse_with_engine_flags(parser, "max_model_len")

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            **args.settings,
            "model": with_tokenizer(args.settings.get("model"), Path(folder) / "model"),
            "max_model_len": args.input_len + max(args.output_len, args.stream_len),
        }
        result: dict[str, Any] = {"arguments": vars(args), "offline": offline(settings, args)}
        speed = result["offline"]["output_tokens_per_s"]
        print(
            f"{args.streams} requests at once, {args.input_len} tokens in, {args.stream_len} out:"
        )
        print(f"  offline {speed:.0f} output tokens/s", end="", flush=True)
        length = ["--input-len", str(args.input_len)]
        with Server(settings, Path(folder) / "log") as server:
            result["streams"] = server.load(args.streams, args.stream_len, *length)
            print(f", server {result['streams']['output_tokens_per_s']:.0f}")
            curve = (
                server.load(
                    max(4, int(float(rate) * args.seconds)),
                    args.output_len,
                    *length,
                    "--request-rate",
                    rate,
                )
                for rate in args.rates
            )
            _, *result["curve"] = print_curve(chain([result["streams"]], curve))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
