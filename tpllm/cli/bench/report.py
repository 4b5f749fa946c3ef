"""Report: a run's records as figures, tables and JSON."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpllm.cli.bench.load import Load, Record

PERCENTILES = (50, 90, 99)
LATENCIES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2el": "end-to-end latency",
}
OBJECTIVES = ("ttft", "tpot", "e2el")  # a request has one value of each

# Above this share of a core, a client measures itself as much as the server.
BUSY = 0.8


def parse_objectives(words: Sequence[str]) -> dict[str, float]:
    """Return `ttft:200 tpot:50` as milliseconds by name.

    Raises:
        ValueError: a word is not of that form.
    """
    objectives: dict[str, float] = {}
    for word in words:
        name, colon, value = word.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = -1.0
        if not colon or name not in OBJECTIVES or not limit_ms > 0:
            raise ValueError(
                f"--goodput {word} must be NAME:MILLISECONDS with a name of "
                f"{', '.join(OBJECTIVES)}, as ttft:200"
            )
        objectives[name] = limit_ms
    return objectives


def summarize(load: Load, objectives: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of a run. A request that failed counts in no other figure."""
    done = [record for record in load.records if record.error is None]
    duration_s = load.duration_s
    num_in = sum(record.num_prompt_tokens for record in done)
    num_out = sum(record.num_output_tokens for record in done)
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(load.records) - len(done),
        "errors": dict(Counter(each.error for each in load.records if each.error is not None)),
        "duration_s": round(duration_s, 3),
        "input_tokens": num_in,
        "output_tokens": num_out,
        "requests_per_s": _per(len(done), duration_s),
        "output_tokens_per_s": _per(num_out, duration_s),
        "total_tokens_per_s": _per(num_in + num_out, duration_s),
    }
    if objectives:
        num_good = sum(_is_good(record, objectives) for record in done)
        figures["goodput_requests_per_s"] = _per(num_good, duration_s)
    for name in LATENCIES:
        figures[f"{name}_ms"] = distribution_ms(_seconds(name, done))
    figures["client"] = {
        "cpu_share": _per(load.cpu_s, duration_s),
        "late_ms": distribution_ms([record.late_s for record in done]),
    }
    return figures


def distribution_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return mean and interpolated percentiles in milliseconds; None without values."""
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    named = {f"p{p}": np.percentile(values, p) for p in PERCENTILES}
    return {name: round(float(v), 3) for name, v in {"mean": values.mean(), **named}.items()}


def print_run(title: str, figures: Mapping[str, Any]) -> None:
    """Print the figures of a run, for people."""
    print(f"\n{title}")
    print(f"  requests     {figures['completed']} completed, {figures['failed']} failed")
    for error, count in figures["errors"].items():
        print(f"               {count} x {error}")
    print(
        f"  tokens       {figures['input_tokens']} in, {figures['output_tokens']} out, "
        f"in {figures['duration_s']:.2f} s"
    )
    print(
        f"  throughput   {figures['requests_per_s']:.2f} requests/s, "
        f"{figures['output_tokens_per_s']:.1f} output tokens/s, "
        f"{figures['total_tokens_per_s']:.1f} tokens/s"
    )
    if "goodput_requests_per_s" in figures:
        print(f"  goodput      {figures['goodput_requests_per_s']:.2f} requests/s")
    print(
        f"  {'ms':<22}"
        + "".join(f"{name:>10}" for name in ("mean", *(f"p{p}" for p in PERCENTILES)))
    )
    for name, words in LATENCIES.items():
        if (values := figures[f"{name}_ms"]) is not None:
            print(f"  {words:<22}" + "".join(f"{value:>10.2f}" for value in values.values()))
    client = figures["client"]
    if client["late_ms"] is not None:
        print(
            f"  this client  {client['cpu_share']:.0%} of a core; requests went out "
            f"{client['late_ms']['p99']:.1f} ms late at p99"
        )
    if client["cpu_share"] > BUSY:
        print("  this client was busy almost all the time: these latencies are partly its own")


def print_curve(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print one row for each run as it ends, and return the runs."""
    heads = ["rate", "streams", "req/s", "out tok/s"]
    heads += [f"{name} {p}" for name in ("ttft", "itl", "e2el") for p in ("p50", "p99")]
    printed: list[dict[str, Any]] = []
    for run in runs:
        if not printed:
            heads += ["good/s"] * ("goodput_requests_per_s" in run)
            print("\n" + "".join(f"{head:>11}" for head in heads))
        cells = [run["request_rate"], run["max_concurrency"] or "any"]
        cells += [run["requests_per_s"], run["output_tokens_per_s"]]
        for name in ("ttft", "itl", "e2el"):
            values = run[f"{name}_ms"] or {}
            cells += [values.get("p50", "-"), values.get("p99", "-")]
        if "goodput_requests_per_s" in run:
            cells.append(run["goodput_requests_per_s"])
        print("".join(f"{_cell(cell):>11}" for cell in cells), flush=True)
        printed.append(run)
    return printed


def _seconds(name: str, records: Sequence[Record]) -> list[float]:
    if name == "itl":
        return [gap for record in records for gap in record.itl_s]
    values = [getattr(record, f"{name}_s") for record in records]
    return [value for value in values if value is not None]


def _is_good(record: Record, objectives: Mapping[str, float]) -> bool:
    """Whether a request met every objective; an output of one token takes no time per token."""
    return all(
        (getattr(record, f"{name}_s") or 0.0) * 1e3 <= limit_ms
        for name, limit_ms in objectives.items()
    )


def _per(amount: float, seconds: float) -> float:
    return round(amount / seconds, 4) if seconds > 0 else 0.0


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
