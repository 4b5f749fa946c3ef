"""Workloads: the two that tpllm's peers are measured on, and their figures.

"seed" is Nano-vLLM's: 256 prompts of 100 to 1024 random tokens, outputs of 100 to 1024 tokens,
temperature 0.6, end tokens ignored: output tokens per second of a full machine. On large batches
it is bound by memory bandwidth (weights and KV cache, every decode step) and, for the prompts, by
matmuls. "latency" is one sequence, 128 tokens in and 256 out: milliseconds per token,
bound by the weights' bytes, and time to the first token.

One warm-up, then the median of the timed runs; the prefix cache is emptied between runs.
"""

import platform
import random
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from tpllm import LLM, SamplingParams, __version__
from tpllm.config.devices import installed

REPO = Path(__file__).resolve().parents[3]


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
    """Output tokens per second, all prompts handed in at once."""
    prompts, params = seed_workload(llm.config.model_config.vocab_size)
    run = partial(run_once, llm, prompts, params)
    run()
    profiler = llm.profiler()
    times = [run() for _ in range(repeats)]
    num_out = sum(each.max_tokens or 0 for each in params)
    figures: dict[str, Any] = {
        "input_tokens": sum(map(len, prompts)),
        "output_tokens": num_out,
        "seconds": [round(seconds, 3) for seconds in times],
        "output_tokens_per_s": round(num_out / statistics.median(times), 1),
    }
    if breakdown:
        figures["breakdown"] = profiler.step_times()
        figures["kernels"] = profiler.decode_kernels(run, skip=300)
    return figures


def measure_latency(llm: LLM, repeats: int, breakdown: bool) -> dict[str, Any]:
    """The first token's time is that of a run of one token; the others share the rest."""
    prompts, params = latency_workload(llm.config.model_config.vocab_size)
    first = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)]
    run, run_first = (partial(run_once, llm, prompts, each) for each in (params, first))
    run()
    run_first()
    profiler = llm.profiler()
    first_ms = statistics.median(run_first() for _ in range(repeats)) * 1e3
    whole_ms = statistics.median(run() for _ in range(repeats)) * 1e3
    num_rest = (params[0].max_tokens or 0) - 1
    figures: dict[str, Any] = {
        "ms_to_first_token": round(first_ms, 3),
        "ms_per_token": round((whole_ms - first_ms) / num_rest, 4),
    }
    if breakdown:
        figures["breakdown"] = profiler.step_times()
        figures["kernels"] = profiler.decode_kernels(run, skip=100)
    return figures


def environment(llm: LLM) -> dict[str, Any]:
    """Return versions, GPU and commit, without which a figure means nothing."""
    return {
        "tpllm": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "flash_attn")},
        **llm.profiler().engine_info,
    }


def _commit() -> str | None:
    """The commit of this checkout; None for an installed package."""
    if not (REPO / ".git").exists():
        return None
    git = subprocess.run(
        ["git", "-C", str(REPO), "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or None


def print_table(name: str, figures: dict[str, Any]) -> None:
    """A workload's figures, for people."""
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


MEASURES = {"seed": measure_seed, "latency": measure_latency}
