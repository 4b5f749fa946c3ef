"""Measures tpllm on the two workloads that other engines are measured on, and the hardware's rates.

tpllm/cli/bench/workloads.py describes the workloads and what bounds them. `tpllm bench` runs one of
them with any engine settings. Prints a table, then one JSON line.

    python launch/bench_tp.py --model launch/configs/Qwen3-8B --load-format dummy --tp 2 --breakdown
"""

import argparse
import json
import time
from typing import Any

from engine_flags import parse_with_engine_flags
from limit import Limit, measured_rates, seed_limit

from tpllm import LLM
from tpllm.cli.bench.workloads import MEASURES, environment, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=("seed", "latency", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts")
    parser.add_argument("--breakdown", action="store_true", help="where a step's time goes")
    parser.add_argument("--no-probe", action="store_true", help="do not measure the GPU itself")
    args = parse_with_engine_flags(parser)
    settings = {"max_model_len": 4096, **args.settings}

    result: dict[str, Any] = {"arguments": vars(args)}
    if not args.no_probe and settings.get("device") != "cpu":
        result["hardware"] = measured_rates()
        print(f"hardware {result['hardware']}", flush=True)
    begin = time.perf_counter()
    with LLM(**settings, skip_tokenizer_init=True) as llm:
        result["startup_s"] = round(time.perf_counter() - begin, 2)
        result |= environment(llm)
        print(
            f"{llm.config.model_config.name}, tp={args.tp}, start to ready {result['startup_s']} s",
            flush=True,
        )
        for name, measure in MEASURES.items():
            if args.workload not in (name, "both"):
                continue
            result[name] = measure(llm, args.repeats, args.breakdown)
            if name == "seed" and (hardware := result.get("hardware")):
                limit = Limit(llm.config.model_config, args.tp, **hardware)
                result[name]["limit_tokens_per_s"] = round(seed_limit(limit), 1)
            print_table(name, result[name])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
