"""Measures tpllm on the two workloads that its peers are measured on.

"seed" is Nano-vLLM's: 256 prompts of 100 to 1024 random tokens, outputs of 100 to 1024 tokens,
temperature 0.6, end tokens ignored: output tokens per second of a full machine. On large batches
it is bound by memory bandwidth (weights and KV cache, every decode step) and, for the prompts, by
matrix products. "latency" is one sequence, 128 tokens in and 256 out: milliseconds per token,
bound by the weights' bytes, and time to the first token.

One warm-up, then the median of the timed runs; the prefix cache is emptied between runs. Prints a
table, then one JSON line.

    python launch/bench_tp.py --model launch/configs/Qwen3-8B --load-format dummy --tp 2 --breakdown
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tpllm import LLM, SamplingParams, __version__

REPO = Path(__file__).resolve().parents[1]


def seed_workload(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts first, then output lengths, all from `random.seed(0)`: 142,827 in, 133,966 out."""
    random.seed(0)
    highest = min(10000, vocab_size - 1)
    prompts = [
        [random.randint(0, highest) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(100, 1024))
        for _ in range(256)
    ]
    return prompts, params


def latency_workload(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """One prompt of 128 tokens, 256 tokens out, greedy."""
    random.seed(0)
    prompt = [random.randint(0, min(10000, vocab_size - 1)) for _ in range(128)]
    return [prompt], [SamplingParams(temperature=0, ignore_eos=True, max_tokens=256)]


def run_once(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    """Seconds of one `generate`, from the call to the outputs."""
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    for output, wanted in zip(outputs, params, strict=True):
        assert len(output.outputs[0].token_ids) == wanted.max_tokens, "an output is too short"
    return seconds


def measure_seed(llm: LLM, repeats: int, breakdown: bool) -> dict[str, Any]:
    prompts, params = seed_workload(llm.config.model_config.vocab_size)
    run_once(llm, prompts, params)
    reset_breakdown(llm)
    times = [run_once(llm, prompts, params) for _ in range(repeats)]
    num_out = sum(each.max_tokens or 0 for each in params)
    figures: dict[str, Any] = {
        "input_tokens": sum(map(len, prompts)),
        "output_tokens": num_out,
        "seconds": [round(seconds, 3) for seconds in times],
        "output_tokens_per_s": round(num_out / statistics.median(times), 1),
    }
    if breakdown:
        figures["breakdown"] = take_breakdown(llm)
        figures["kernels"] = profile_kernels(llm, prompts, params, skip=300)
    return figures


def measure_latency(llm: LLM, repeats: int, breakdown: bool) -> dict[str, Any]:
    """The first token's time is that of a run of one token; the others share the rest."""
    prompts, params = latency_workload(llm.config.model_config.vocab_size)
    first = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)]
    for each in (params, first):
        run_once(llm, prompts, each)
    reset_breakdown(llm)
    first_ms = statistics.median(run_once(llm, prompts, first) for _ in range(repeats)) * 1e3
    whole_ms = statistics.median(run_once(llm, prompts, params) for _ in range(repeats)) * 1e3
    num_rest = (params[0].max_tokens or 0) - 1
    figures: dict[str, Any] = {
        "ms_to_first_token": round(first_ms, 3),
        "ms_per_token": round((whole_ms - first_ms) / num_rest, 4),
    }
    if breakdown:
        figures["breakdown"] = take_breakdown(llm)
        figures["kernels"] = profile_kernels(llm, prompts, params, skip=100)
    return figures


def profile_kernels(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], skip: int
) -> dict[str, Any] | None:
    """One more run, of which some decode steps are traced."""
    llm.coordinator.profile_decode(skip, num_steps=10)
    run_once(llm, prompts, params)
    kernels: dict[str, Any] | None = llm.coordinator.worker_times()["kernels"]
    return kernels


def reset_breakdown(llm: LLM) -> None:
    llm.coordinator.worker_times()
    llm.coordinator.times = type(llm.coordinator.times)()


def take_breakdown(llm: LLM) -> dict[str, Any]:
    """Milliseconds per step, decode steps and mixed ones apart, and the coordinator's own."""
    workers, host = llm.coordinator.worker_times(), llm.coordinator.times
    sampling_ms = workers.pop("graph_sampling_ms")
    workers.pop("kernels")
    num_steps = sum(kind["steps"] for kind in workers.values())
    figures: dict[str, Any] = {}
    for name, kind in workers.items():
        steps = kind.pop("steps")
        if steps:
            means = {field: round(total / steps, 4) for field, total in kind.items() if total}
            figures[name] = {"steps": int(steps)} | means
    if sampling_ms is not None:  # inside a graph sampling is not timed: alone, at the largest batch
        figures["graph_sampling_ms"] = round(sampling_ms, 4)
    for name, seconds in vars(host).items():
        figures[name.removesuffix("_s") + "_ms"] = round(seconds * 1e3 / max(1, num_steps), 4)
    return figures


def environment(llm: LLM) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    git = subprocess.run(
        ["git", "-C", str(REPO), "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "tpllm": __version__,
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "flash_attn")},
        **llm.coordinator.worker_info,
    }


def print_table(name: str, figures: dict[str, Any]) -> None:
    print(f"\n{name}")
    for key, value in figures.items():
        if key not in ("breakdown", "kernels"):
            print(f"  {key:<24}{value}")
    for key, value in figures.get("breakdown", {}).items():
        print(f"    {key:<22}{value}")
    if kernels := figures.get("kernels"):
        print(
            f"  kernels of a decode step of {kernels['rows']:.0f} rows: {kernels['step_us']} us, "
            f"of which {kernels['gaps_us']} us between kernels"
        )
        for kernel in kernels["kernels"]:
            print(f"    {kernel['us']:>8} us in {kernel['calls']:>6} calls  {kernel['name']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hugging Face id (default: the shipped model)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor_parallel_size")
    parser.add_argument("--workload", choices=("seed", "latency", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts")
    parser.add_argument("--load-format", default="auto", help='"dummy" needs only a config.json')
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--breakdown", action="store_true", help="where a step's time goes")
    parser.add_argument("--no-probe", action="store_true", help="do not measure the GPU itself")
    args = parser.parse_args()

    result: dict[str, Any] = {"arguments": vars(args)}
    if not args.no_probe and args.device != "cpu":
        probe = [sys.executable, str(REPO / "launch" / "probe.py")]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        result["hardware"] = json.loads(done.stdout) if done.returncode == 0 else None
    begin = time.perf_counter()
    with LLM(
        args.model,
        tensor_parallel_size=args.tp,
        load_format=args.load_format,
        device=args.device,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
        skip_tokenizer_init=True,
    ) as llm:
        result["startup_s"] = round(time.perf_counter() - begin, 2)
        result |= environment(llm)
        if args.workload in ("seed", "both"):
            result["seed"] = measure_seed(llm, args.repeats, args.breakdown)
        if args.workload in ("latency", "both"):
            result["latency"] = measure_latency(llm, args.repeats, args.breakdown)
    print(f"{args.model or 'shipped model'}, tp={args.tp}, start to ready {result['startup_s']} s")
    print(f"hardware {result.get('hardware')}")
    for name in ("seed", "latency"):
        if name in result:
            print_table(name, result[name])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
