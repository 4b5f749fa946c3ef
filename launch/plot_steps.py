"""Draws how the cost of a step grows, from the output of bench_steps.py and bench_host.py.

Takes files with their JSON lines, for any models and numbers of GPUs, and writes three plots that
are legible on white and on dark backgrounds: a decode step's time against the batch and against the
context, each with the hardware's limit, and the coordinator's time against the number of sequences.

Needs matplotlib: pip install tpllm[plots]

    python launch/bench_steps.py --model launch/configs/Qwen3-8B --load-format dummy > 8b.txt
    python launch/bench_host.py --only schedule > host.txt
    python launch/plot_steps.py 8b.txt host.txt
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
# Of medium lightness, so that they contrast with black and with white.
COLORS = ("#3d8bd4", "#d9722e", "#2f9e6e", "#b561c9", "#c79a1e", "#d1526c")
GREY = "#808890"


@dataclass(frozen=True)
class Curve:
    """Milliseconds [n] against numbers [n], both rising; `limit_ms` [n] is the hardware's limit."""

    label: str
    x: list[int]
    ms: list[float]
    limit_ms: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    curves: list[Curve]


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the JSON lines of files that may also contain tables.

    Raises:
        ValueError: a file has no JSON line.
    """
    results = []
    for path in paths:
        lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
        if not lines:
            raise ValueError(
                f"{path} has no JSON line; give the output of bench_steps.py or bench_host.py"
            )
        results += [json.loads(line) for line in lines]
    return results


def batch_panel(results: list[dict[str, Any]]) -> Panel | None:
    """Plot step time against the batch, with a curve for each model and number of GPUs."""
    curves = []
    for result in results:
        below = result.get("arguments", {}).get("batch_context") if "steps" in result else None
        points = [each for each in result.get("steps", []) if each["below"] == below]
        if points:
            curves.append(_curve(_name(result), points, "num_seqs"))
            title = f"A decode step at a context of about {below} tokens"
    return Panel(title, "sequences in the batch", curves) if curves else None


def context_panels(results: list[dict[str, Any]]) -> list[Panel]:
    """Plot step time against the context, with a panel for each batch size measured at several."""
    by_size: dict[int, list[Curve]] = {}
    for result in results:
        if "steps" not in result:
            continue
        for num_seqs in result["arguments"]["context_batches"]:
            points = [each for each in result["steps"] if each["num_seqs"] == num_seqs]
            if len(points) > 1:
                by_size.setdefault(num_seqs, []).append(_curve(_name(result), points, "context"))
    return [
        Panel(f"{size} sequence{'s' * (size > 1)}", "context, tokens", by_size[size])
        for size in sorted(by_size)
    ]


def coordinator_panel(results: list[dict[str, Any]]) -> Panel | None:
    """Plot the coordinator's time for a step against the sequences, with a curve for each CPU."""
    curves = []
    for result in results:
        rows = result.get("schedule", {})
        by_size = {int(name.split()[0]): row["step_ms"] for name, row in rows.items()}
        if by_size:
            sizes = sorted(by_size)
            curves.append(Curve(result["cpu"], sizes, [by_size[size] for size in sizes]))
    title = "The coordinator's work for a decode step"
    return Panel(title, "sequences in the batch", curves) if curves else None


def _name(result: dict[str, Any]) -> str:
    name = f"{result['model']}, {result['arguments']['tp']} x {result['gpu'] or 'CPU'}"
    return name.replace("NVIDIA ", "")


def _curve(label: str, points: list[dict[str, Any]], x: str) -> Curve:
    points = sorted(points, key=lambda point: point[x])
    has_limit = all("limit_ms" in point for point in points)
    return Curve(
        label,
        [point[x] for point in points],
        [point["step_ms"] for point in points],
        [point["limit_ms"] for point in points] if has_limit else None,
    )


def draw(panels: list[Panel], path: Path) -> None:
    """Write an SVG of the panels side by side. Both axes are logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": "tpllm", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), GREY)
    style |= dict.fromkeys(("xtick.color", "ytick.color"), GREY)
    labels = dict.fromkeys(curve.label for panel in panels for curve in panel.curves)
    color_of = dict(zip(labels, COLORS * (1 + len(labels) // len(COLORS)), strict=False))
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(2 + 4.5 * len(panels), 4.5), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw_panel(axes, panel, color_of)
        all_axes[0].set_ylabel("milliseconds")
        all_axes[0].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def _draw_panel(axes: Any, panel: Panel, color_of: dict[str, str]) -> None:
    from matplotlib.ticker import LogFormatter, LogLocator

    for curve in panel.curves:
        color = color_of[curve.label]
        axes.plot(curve.x, curve.ms, color=color, marker="o", markersize=4, label=curve.label)
        if curve.limit_ms is not None:
            axes.plot(curve.x, curve.limit_ms, color=color, linestyle="--", linewidth=1)
    if any(curve.limit_ms is not None for curve in panel.curves):
        axes.plot([], [], color=GREY, linestyle="--", linewidth=1, label="what the hardware allows")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=4))  # every power of two would not fit
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.grid(color=GREY, alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="with JSON lines of the two scripts")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the plots go")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("plot_steps.py needs matplotlib: pip install tpllm[plots]")
    try:
        results = read_results(args.files)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_steps.py: {error}")
    batch, coordinator = batch_panel(results), coordinator_panel(results)
    plots = {
        "steps-by-batch.svg": [batch] if batch else [],
        "steps-by-context.svg": context_panels(results),
        "coordinator.svg": [coordinator] if coordinator else [],
    }
    for name, panels in plots.items():
        if panels:
            draw(panels, args.folder / name)
            print(args.folder / name)


if __name__ == "__main__":
    main()
