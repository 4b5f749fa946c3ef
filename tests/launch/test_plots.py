"""The plots of how steps grow: which figures they show; drawn only if matplotlib is installed."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from launch.plot_steps import (
    Curve,
    batch_panel,
    context_panels,
    coordinator_panel,
    main,
    read_results,
)
from tests.launch.test_benchmarks import run_text

HOST = {
    "cpu": "a CPU",
    "schedule": {"64 sequences": {"step_ms": 0.2}, "1 sequences": {"step_ms": 0.1}},
}


def point(num_seqs: int, below: int, step_ms: float) -> dict[str, Any]:
    context = below - 10
    figures = {"step_ms": step_ms, "limit_ms": step_ms / 2}
    return {"num_seqs": num_seqs, "below": below, "context": context, **figures}


def steps(model: str, tp: int, *points: dict[str, Any]) -> dict[str, Any]:
    arguments = {"tp": tp, "batch_context": 512, "context_batches": [1, 16, 64]}
    return {"model": model, "gpu": "NVIDIA H200", "arguments": arguments, "steps": list(points)}


SMALL = steps("small", 1, point(16, 512, 5), point(1, 512, 4), point(1, 128, 3), point(64, 128, 9))
LARGE = steps("large", 2, point(1, 512, 7))


def test_steps_are_drawn_against_the_batch_at_the_context_that_was_asked_for() -> None:
    panel = batch_panel([SMALL, HOST, LARGE])
    assert panel is not None and "about 512 tokens" in panel.title
    assert panel.curves == [
        Curve("small, 1 x H200", [1, 16], [4, 5], [2, 2.5]),
        Curve("large, 2 x H200", [1], [7], [3.5]),
    ]
    assert batch_panel([HOST]) is None


def test_steps_are_drawn_against_true_contexts_where_a_batch_has_several() -> None:
    (panel,) = context_panels([SMALL, LARGE, HOST])
    assert panel.title == "1 sequence"
    assert panel.curves == [Curve("small, 1 x H200", [118, 502], [3, 4], [1.5, 2])]


def test_the_coordinators_time_is_drawn_in_order_of_sequences() -> None:
    panel = coordinator_panel([SMALL, HOST])
    assert panel is not None
    assert panel.curves == [Curve("a CPU", [1, 64], [0.1, 0.2])]


def test_a_run_without_a_gpu_has_no_limit_beside_it() -> None:
    figures = {"num_seqs": 1, "below": 512, "context": 500, "step_ms": 4.0, "gpu_ms": 3.9}
    panel = batch_panel([steps("small", 1, figures) | {"gpu": None}])
    assert panel is not None
    assert panel.curves == [Curve("small, 1 x CPU", [1], [4.0])]


def test_json_lines_are_found_among_tables(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text(f"a table\n  1 2\n{json.dumps(SMALL)}\n{json.dumps(HOST)}\n")
    assert read_results([path]) == [SMALL, HOST]
    path.write_text("a table\n")
    with pytest.raises(ValueError, match=r"run\.txt has no JSON line; give the output"):
        read_results([path])


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["plot_steps.py", "run.txt"])
    with pytest.raises(SystemExit, match=r"needs matplotlib: pip install tpllm\[plots\]"):
        main()


def test_plots_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run.txt"
    run.write_text(f"{json.dumps(SMALL)}\n{json.dumps(HOST)}\n")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        run_text("plot_steps.py", str(run), "--folder", str(folder))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["coordinator.svg", "steps-by-batch.svg", "steps-by-context.svg"]
    for name in names:
        first, second = ((folder / name).read_text() for folder in folders)
        assert first == second
        assert ElementTree.fromstring(first).tag.endswith("svg")
    assert "small, 1 x H200" in first and "what the hardware allows" in first
