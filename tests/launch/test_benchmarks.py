"""The scripts that people run: each prints a table and one JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of launch/, and return what its last line says."""
    figures: dict[str, Any] = json.loads(run_text(script, *arguments).splitlines()[-1])
    return figures


def run_text(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(REPO / "launch" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_latency_on_the_shipped_model_with_its_breakdown() -> None:
    arguments = ["--workload", "latency", "--device", "cpu", "--tp", "1"]
    figures = run("bench_tp.py", *arguments, "--repeats", "1", "--breakdown")
    assert figures["arguments"]["tp"] == 1
    assert figures["tpllm"] and figures["python"] and figures["torch"]
    assert figures["startup_s"] > 0
    latency = figures["latency"]
    assert latency["ms_to_first_token"] > 0 and latency["ms_per_token"] > 0
    assert latency["breakdown"]["decode"]["steps"] == 255
    assert {"prepare_ms", "gpu_ms", "sample_ms", "idle_ms"} < latency["breakdown"]["decode"].keys()
    host = {"schedule_ms", "broadcast_ms", "wait_ms", "collect_ms"}
    assert host < latency["breakdown"].keys()


def test_the_cost_of_scheduling_is_measured() -> None:
    figures = run("bench_host.py", "--only", "schedule", "--num-seqs", "1", "64")
    assert set(figures["schedule"]) == {"1 sequences", "64 sequences"}
    assert all(row["step_ms"] > 0 for row in figures["schedule"].values())


def test_the_cost_of_text_is_measured() -> None:
    figures = run("bench_host.py", "--only", "text", "--num-seqs", "16")
    assert all(value > 0 for value in figures["text"]["16 streams"].values())


def test_the_cost_of_every_sampling_option_is_measured() -> None:
    arguments = ["--device", "cpu", "--num-seqs", "4", "--num-steps", "4"]
    options = run("bench_sampling.py", *arguments)["options"]
    assert len(options) == 14
    assert options["temperature"]["added_ms"] == 0
    assert all(each["step_ms"] > 0 for each in options.values())


@pytest.mark.parametrize(
    "model, tp, expected",
    [("0.6B", 1, 36168), ("8B", 1, 12676), ("0.6B", 2, 60339), ("8B", 2, 22094), ("32B", 4, 12937)],
)
def test_the_limit_is_the_one_that_the_peers_are_held_against(model, tp, expected) -> None:
    arguments = ["--model", str(REPO / f"launch/configs/Qwen3-{model}"), "--tp", str(tp)]
    limit = run_text("limit.py", *arguments).split()[0]
    assert float(limit) == pytest.approx(expected, rel=0.002)
