"""Measures how a decode step's time grows with the batch and with the context.

The weights' bytes bound small batches, matmuls bound large ones, and the bytes of keys and values
bound long contexts. Beside each step stands the hardware's limit (limit.py, with the rates that
probe.py measures). Sequences have different prompts, since shared prompts would share cache blocks
too. A prompt is the beginning of one endless text of its sequence, so that the prefix cache has
most of it when a later measurement needs a longer one. Batches that the KV cache cannot hold are
skipped and reported.

The contexts of a step are a little below the context that its row is named by; the limit is
computed for the actual ones. About 1.5 million prompt tokens are computed, which takes most of the
time: about a minute on one H200 for an 8B model. `--quick` measures only a few points.

Prints a table, then one JSON line, which plot_steps.py draws.

    python launch/bench_steps.py --model launch/configs/Qwen3-8B --load-format dummy --tp 2
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from engine_flags import parse_with_engine_flags
from limit import Limit, measured_rates

from tpllm import LLM, SamplingParams
from tpllm.cli.bench.workloads import environment
from tpllm.engine.coordinator import MAX_STEPS_IN_FLIGHT
from tpllm.engine.request import AddRequest
from tpllm.offline.profiler import NUM_REFILL, Profiler

FULL: dict[str, list[int]] = {
    "batches": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536],
    "contexts": [128, 1024, 2048, 4096, 8192, 16384, 32768],
    "context_batches": [1, 16, 64],
}
QUICK: dict[str, list[int]] = {
    "batches": [1, 16, 256],
    "contexts": [128, 4096],
    "context_batches": [1, 16],
}
STEP_TOKENS = 16384  # max_num_batched_tokens
NUM_WARM_UP = 2  # steps of each batch size: the first replay of a graph takes longer
SIZES_PER_PREFILL = 3  # batch sizes measured one after the other before prompts start again


def tokens_per_size(num_steps: int) -> int:
    """Return by how many tokens contexts grow while one batch size is measured."""
    return NUM_WARM_UP + NUM_REFILL + num_steps + 2 * MAX_STEPS_IN_FLIGHT


def prompt_length(context: int, num_seqs: int, num_steps: int) -> int:
    """Return a prompt length with which no context exceeds `context` before the batch starts again.

    A sequence that is admitted early decodes while the others' prompts are computed.
    """
    num_prefills = -(-num_seqs * context // STEP_TOKENS)
    return context - num_prefills - SIZES_PER_PREFILL * tokens_per_size(num_steps)


def requests_of(vocab_size: int, num_seqs: int, length: int, longest: int) -> list[AddRequest]:
    """Return requests with the first `length` tokens of `num_seqs` texts."""
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=None)
    requests = []
    for i in range(num_seqs):
        text = np.random.default_rng(i).integers(vocab_size, size=longest)
        requests.append(AddRequest(str(i), text[:length].tolist(), params))
    return requests


def measure(
    llm: LLM, context: int, sizes: list[int], num_steps: int, longest: int
) -> Iterator[dict[str, Any]]:
    """Time a decode step at about this context for each batch size, the largest first."""
    batch = None
    for num_seqs in sorted(sizes, reverse=True):
        if batch and max(batch.contexts) + tokens_per_size(num_steps) > context:
            batch.shrink(0)
            batch = None
        if batch is None:
            length = prompt_length(context, num_seqs, num_steps)
            vocab_size = llm.config.model_config.vocab_size
            requests = requests_of(vocab_size, num_seqs, length, longest)
            batch = llm.profiler().decode_batch(requests)
            batch.warm_up(1)
        batch.shrink(num_seqs)
        batch.warm_up(NUM_WARM_UP)
        figures = batch.time(num_steps)
        mean_context = statistics.mean(batch.contexts) - (num_steps - 1) / 2
        yield {"num_seqs": num_seqs, "below": context, "context": round(mean_context), **figures}
    if batch:
        batch.shrink(0)


def reason_to_skip(
    profiler: Profiler, block_size: int, context: int, num_seqs: int, max_batch_tokens: int
) -> str | None:
    """Return why a batch is skipped, or None if it is not."""
    if context > profiler.max_total_tokens:
        return f"a sequence may have {profiler.max_total_tokens} tokens"
    usable = profiler.num_kv_blocks
    if num_seqs * -(-context // block_size) > usable:
        return f"the KV cache holds {usable} blocks of {block_size} tokens"
    if num_seqs * context > max_batch_tokens:
        return (
            f"{num_seqs * context} tokens are more than the largest batch has, {max_batch_tokens}"
        )
    return None


def print_row(point: dict[str, Any]) -> None:
    cells = [f"{point['num_seqs']:9}{point['context']:9}{point['step_ms']:10.3f}"]
    cells.append(f"{point['gpu_ms']:10.3f}" if "gpu_ms" in point else f"{'':10}")
    if "limit_ms" in point:
        cells.append(f"{point['limit_ms']:10.3f}{point['limit_ms'] / point['step_ms']:9.0%}")
    print("".join(cells), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only a few points")
    for name, values in FULL.items():
        words = " ".join(map(str, values))
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, nargs="+", metavar="N", help=f"default: {words}")
    parser.add_argument("--batch-context", type=int, default=512, help="tokens, for --batches")
    parser.add_argument("--num-steps", type=int, default=12, help="steps timed at each point")
    args = parse_with_engine_flags(
        parser, "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"
    )
    for name, values in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, values)
    for context, sizes in batches_by_context(args).items():
        if prompt_length(context, max(sizes), args.num_steps) < 1:
            parser.error(
                f"a context of {context} tokens leaves no prompt for {max(sizes)} sequences and "
                f"--num-steps {args.num_steps}; use a longer context or fewer steps"
            )
    return args


def batches_by_context(args: argparse.Namespace) -> dict[int, list[int]]:
    """Return the batch sizes at each context. Contexts rise, so that prompts extend cached ones."""
    plan = {context: set(args.context_batches) for context in args.contexts}
    plan.setdefault(args.batch_context, set()).update(args.batches)
    return {context: sorted(plan[context]) for context in sorted(plan)}


def main() -> None:
    args = parse_arguments()
    rates = measured_rates() if args.settings.get("device") != "cpu" else None
    max_batch_tokens = max(args.batches) * args.batch_context
    begin = time.perf_counter()
    with LLM(
        **args.settings,
        max_num_seqs=max(args.batches + args.context_batches),
        max_num_batched_tokens=STEP_TOKENS,
        gpu_memory_utilization=0.95,  # at 0.9 an 8B model on one H200 has no room for 1,536
        skip_tokenizer_init=True,
    ) as llm:
        startup_s = time.perf_counter() - begin
        config = llm.config.model_config
        profiler, block_size = llm.profiler(), llm.config.kv_block_size
        num_tokens = profiler.num_kv_blocks * block_size
        result: dict[str, Any] = {"arguments": vars(args), "model": config.name}
        result |= {"hardware": rates, "kv_cache_tokens": num_tokens}
        result |= environment(llm) | {"startup_s": round(startup_s, 2), "steps": [], "skipped": []}
        limit = Limit(config, args.tp, **rates) if rates else None
        print(f"{config.name}, tp={args.tp}, {result['gpu'] or 'CPU'}, {num_tokens} tokens of KV")
        print(f"hardware {rates}")
        print("sequences  context   step ms    gpu ms  limit ms  reached")
        for context, sizes in batches_by_context(args).items():
            fitting = []
            for num_seqs in sizes:
                reason = reason_to_skip(profiler, block_size, context, num_seqs, max_batch_tokens)
                if reason is None:
                    fitting.append(num_seqs)
                else:
                    skipped = {"num_seqs": num_seqs, "below": context, "reason": reason}
                    result["skipped"].append(skipped)
                    print(f"{num_seqs:9}{context:9}  left out: {reason}")
            for point in measure(
                llm, context, fitting, args.num_steps, max(batches_by_context(args))
            ):
                if limit:
                    num_keys = point["num_seqs"] * point["context"]
                    limit_ms = limit.decode_step_s(point["num_seqs"], num_keys) * 1e3
                    point["limit_ms"] = round(limit_ms, 4)
                result["steps"].append(point)
                print_row(point)
        stats = llm.stats()
        result["preemptions"] = stats.num_preemptions
        if stats.num_preemptions:
            print("a batch did not fit in the cache and was preempted: do not trust these figures")
        result["prompt_tokens"] = stats.num_prompt_tokens
        result["cached_prompt_tokens"] = stats.num_cached_tokens
    result["seconds"] = round(time.perf_counter() - begin, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
