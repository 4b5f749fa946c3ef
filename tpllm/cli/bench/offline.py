"""`tpllm bench seed` and `tpllm bench latency`: an engine of our own, without a server."""

import json
from argparse import Namespace

from tpllm.cli.command import Commands, add_command, add_engine_flags, engine, engine_settings

SUMMARIES = {
    "seed": "measure output tokens per second of 256 prompts at once",
    "latency": "measure milliseconds per token of one sequence, and to its first",
}
DEFAULTS = {"max_model_len": 4096}  # the longest sequence of either has 2048
FORCED = {"skip_tokenizer_init": True}  # prompts are random token ids


def add(commands: Commands) -> None:
    for name, summary in SUMMARIES.items():
        example = f"tpllm bench {name} Qwen/Qwen3-8B --tensor-parallel-size 2"
        parser = add_command(commands, name, run, summary, example)
        parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs (3)")
        parser.add_argument("--breakdown", action="store_true", help="where a step's time goes")
        add_engine_flags(parser, leave_out=("tokenizer", *FORCED), defaults=DEFAULTS)
        parser.set_defaults(workload=name)


def run(args: Namespace) -> int:
    from tpllm.cli.bench.workloads import MEASURES, environment, print_table

    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats} must be at least 1")
    given = engine_settings(args, DEFAULTS)
    given.values.update(FORCED)
    with engine(args, given) as llm:
        figures = MEASURES[args.workload](llm, args.repeats, args.breakdown)
        result = {"settings": given.values, "startup_s": round(llm.startup_s, 2)}
        result |= {**environment(llm), args.workload: figures}
    print_table(args.workload, figures)
    print(json.dumps(result))
    return 0
