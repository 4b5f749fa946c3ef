"""Measures the start of an engine: from the start of the program until it can generate.

Weights are in the page cache. Triton's cache is a new folder each time, so nothing is compiled
yet. The page cache and PCIe bound the reading of weights, 5 to 25 GB/s a rank; the rest is imports,
NCCL, compiling kernels and capturing graphs. If the model folder has only a config, random weights
are written first, into a folder that is removed at the end.

Prints when each phase began, then one JSON line.

    python launch/bench_start.py --model launch/configs/Qwen3-8B --tp 2
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine_flags import parse_with_engine_flags

from tpllm.config.checkpoint_files import INDEX_NAME
from tpllm.config.model_config import ModelConfig

SHARD_BYTES = 4 << 30
SELF = Path(__file__).resolve()


def write_random_checkpoint(source: Path, folder: Path) -> None:
    """Write a checkpoint of bfloat16 weights in a model's shapes; norms are 1.

    It writes one block of noise to the files repeatedly. Making each tensor first would take
    several times as long.
    """
    import torch

    shutil.copytree(source, folder, dirs_exist_ok=True)
    noise = 0.02 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    blocks = {
        is_norm: memoryview(values.bfloat16().view(torch.uint8).numpy())
        for is_norm, values in ((False, noise), (True, torch.ones(1 << 16)))
    }
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in ModelConfig.from_folder(source).spec.shapes().items():
        if held >= SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += 2 * math.prod(shape)

    def write(number: int) -> None:
        header, end = {}, 0
        for name, shape in shards[number].items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / _shard_name(number)).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shards[number].items():
                block, left = blocks[name.endswith("norm.weight")], 2 * math.prod(shape)
                while left:
                    left -= file.write(block[: min(left, len(block))])

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(len(shards))))
    weight_map = {name: _shard_name(i) for i, shard in enumerate(shards) for name in shard}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def start_once(settings: dict[str, Any]) -> None:
    """Create an engine and print when each phase of rank 0 began: the program that is measured."""
    from tpllm import LLM

    begin = float(os.environ["BENCH_START_BEGIN"])
    phases = {"imported": time.time() - begin}

    def on_phase(rank: int, phase: str) -> None:
        if rank == 0:
            phases.setdefault(phase, time.time() - begin)

    with LLM(**settings, skip_tokenizer_init=True, on_phase=on_phase) as llm:
        phases["ready"] = time.time() - begin
        info = llm.profiler().engine_info
    print(json.dumps({"phases": phases, "info": info}))


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run `start_once` in a new process."""
    command = [sys.executable, str(SELF), "--once", json.dumps(settings)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_CACHE_DIR": cache, "BENCH_START_BEGIN": str(time.time())}
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"the engine did not start:\n{done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of starts; the median is reported"
    )
    parser.add_argument("--once", type=json.loads, metavar="SETTINGS", help=argparse.SUPPRESS)
    args = parse_with_engine_flags(parser)
    if args.once:
        start_once(args.once)
        return
    if "model" not in args.settings:
        parser.error("--model, a folder, is required")
    source = Path(args.settings["model"]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        model = source
        if not list(model.glob("*.safetensors")):
            model = Path(folder) / model.name
            begin = time.perf_counter()
            write_random_checkpoint(source, model)
            print(f"weights written in {time.perf_counter() - begin:.1f} s", flush=True)
        num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        for file in model.glob("*.safetensors"):  # into the page cache
            with file.open("rb") as opened:
                while opened.read(64 << 20):
                    pass
        settings = {"max_model_len": 4096, **args.settings, "model": str(model)}
        starts = []
        for _ in range(args.repeats):
            starts.append(measure(settings))
            print(f"ready after {starts[-1]['phases']['ready']:.2f} s", flush=True)
    phases = [start["phases"] for start in starts]
    medians = {name: statistics.median(each[name] for each in phases) for name in phases[0]}
    for name, seconds in medians.items():
        print(f"  {seconds:7.2f} s  {name}")
    print(f"{source.name}, tp={args.tp}: ready after {medians['ready']:.2f} s")
    result = {
        "arguments": {"repeats": args.repeats, **settings, "model": source.name},
        "checkpoint_bytes": num_bytes,
        "ready_s": [round(each["ready"], 2) for each in phases],
        "phases_s": {name: round(seconds, 2) for name, seconds in medians.items()},
        **starts[0]["info"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
