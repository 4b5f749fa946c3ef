"""Measures what each sampling option adds to a decode step, beyond plain temperature, in ms.

All sequences of a batch of short contexts use the same option; in the "one row" case only one of
them does. The weights' bytes bound the step. An option adds passes over the float32 logits of its
rows (156 MB for 256 rows of Qwen3) and, on several GPUs, the latency of a few dozen small
all-reduces. `step_ms` is the median time from result to result, as a caller sees it. `gpu_ms` is
the mean by the GPU's own clock; if it is lower, the host is the slower one.

Prints a table, then one JSON line.

    python launch/bench_sampling.py --model launch/configs/Qwen3-8B --load-format dummy --tp 2
"""

import argparse
import json
import random
from dataclasses import replace
from typing import Any

from engine_flags import parse_with_engine_flags

from tpllm import LLM, SamplingParams
from tpllm.cli.bench.workloads import environment
from tpllm.engine.request import AddRequest

PROMPT_LENGTH = 32
NUM_WARM_UP = 8


def options_of(vocab_size: int, num_tokens: int) -> dict[str, dict[str, Any]]:
    """Return every option, by its name in the table."""
    ids = random.Random(0).sample(range(vocab_size), 1000)
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    return {
        "temperature": {},
        "greedy": {"temperature": 0.0},
        "top_k=50": {"top_k": 50},
        "top_p=0.95": {"top_p": 0.95},
        "min_p=0.05": {"min_p": 0.05},
        "top_k=20, top_p=0.95": {"top_k": 20, "top_p": 0.95},
        "three penalties": penalties,
        "logit_bias of 300 ids": {"logit_bias": dict.fromkeys(ids[:300], -1.0)},
        "allowed_token_ids, 1000": {"allowed_token_ids": ids},
        "bad_words, 10": {"bad_words": ["word"] * 10},
        "min_tokens, 100 end ids": {"min_tokens": num_tokens, "stop_token_ids": ids[:100]},
        "logprobs=0": {"logprobs": 0},
        "logprobs=20": {"logprobs": 20},
    }


def measure(llm: LLM, each: list[SamplingParams], num_steps: int) -> dict[str, float]:
    """Run a batch of requests and time `num_steps` decode steps in the middle of it."""
    numbers = random.Random(0)
    vocab_size = llm.config.model_config.vocab_size
    requests = []
    for i, params in enumerate(each):
        prompt = [numbers.randrange(vocab_size) for _ in range(PROMPT_LENGTH)]
        words = [[7 * j, 7 * j + 1, j] for j in range(len(params.bad_words))]
        requests.append(AddRequest(str(i), prompt, params, words))
    batch = llm.profiler().decode_batch(requests)
    batch.warm_up(NUM_WARM_UP)
    figures = batch.time(num_steps)
    batch.shrink(0)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-seqs", type=int, default=256, help="sequences in the batch")
    parser.add_argument("--num-steps", type=int, default=100, help="decode steps that are timed")
    args = parse_with_engine_flags(parser, "max_model_len", "max_num_seqs")

    num_tokens = NUM_WARM_UP + args.num_steps + 16
    with LLM(
        **args.settings,
        max_model_len=PROMPT_LENGTH + num_tokens,
        max_num_seqs=args.num_seqs,
        skip_tokenizer_init=True,
    ) as llm:
        result: dict[str, Any] = {"arguments": vars(args)} | environment(llm)
        plain = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=None)
        options = options_of(llm.config.model_config.vocab_size, num_tokens)
        batches = {name: [replace(plain, **each)] * args.num_seqs for name, each in options.items()}
        batches["one row top_p=0.95"] = [plain] * (args.num_seqs - 1) + [replace(plain, top_p=0.95)]
        print(f"{llm.config.model_config.name}, tp={args.tp}, {args.num_seqs} sequences")
        result["options"] = {}
        for name, params in batches.items():
            figures = measure(llm, params, args.num_steps)
            result["options"][name] = figures
            first = result["options"]["temperature"]["step_ms"]
            figures["added_ms"] = round(figures["step_ms"] - first, 4)
            words = "   ".join(f"{key} {value:8.3f}" for key, value in figures.items())
            print(f"  {name:<26}{words}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
