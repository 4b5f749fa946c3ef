"""The scripts that people run: each prints a table and one JSON line.

Those that need torch or transformers run in this process, which has imported both.
"""

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.limit import Limit
from tpllm import SamplingParams
from tpllm.cli.bench import workloads
from tpllm.config.model_config import ModelConfig

pytestmark = pytest.mark.usefixtures("forked_engines")

REPO = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of launch/ and return the JSON of its last line."""
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


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    def run_script(script: str, *arguments: str) -> dict[str, Any]:
        """Run a script like `run`, but in this process."""
        path = str(REPO / "launch" / script)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.syspath_prepend(REPO / "launch")  # where such a script looks for modules
        runpy.run_path(path, run_name="__main__")
        figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    return run_script


def test_latency_on_the_shipped_model_with_its_breakdown(run_here, monkeypatch) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=112)  # less than half
    monkeypatch.setattr(workloads, "latency_workload", lambda vocab_size: ([[7] * 128], [params]))
    arguments = ["--workload", "latency", "--device", "cpu", "--tp", "1"]
    figures = run_here("bench_tp.py", *arguments, "--repeats", "1", "--breakdown")
    assert figures["arguments"]["tp"] == 1
    assert figures["tpllm"] and figures["python"] and figures["torch"]
    assert figures["startup_s"] > 0
    latency = figures["latency"]
    assert latency["ms_to_first_token"] > 0 and latency["ms_per_token"] > 0
    # a step's times are noted after its result is sent, so the last may be missing
    assert latency["breakdown"]["decode"]["steps"] in (110, 111)
    assert {"prepare_ms", "gpu_ms", "sample_ms", "idle_ms"} < latency["breakdown"]["decode"].keys()
    host = {"schedule_ms", "broadcast_ms", "wait_ms", "collect_ms"}
    assert host < latency["breakdown"].keys()


def test_the_cost_of_scheduling_is_measured() -> None:
    figures = run("bench_host.py", "--only", "schedule", "--num-seqs", "1", "64")
    assert set(figures["schedule"]) == {"1 sequences", "64 sequences"}
    assert all(row["step_ms"] > 0 for row in figures["schedule"].values())


def test_the_cost_of_text_is_measured(run_here) -> None:
    figures = run_here("bench_host.py", "--only", "text", "--num-seqs", "16")
    assert all(value > 0 for value in figures["text"]["16 streams"].values())


def test_the_cost_of_every_sampling_option_is_measured(run_here) -> None:
    arguments = ["--device", "cpu", "--num-seqs", "4", "--num-steps", "4"]
    options = run_here("bench_sampling.py", *arguments)["options"]
    assert len(options) == 14
    assert options["temperature"]["added_ms"] == 0
    assert all(each["step_ms"] > 0 for each in options.values())


def test_steps_are_timed_by_batch_and_by_context() -> None:
    arguments = ["--device", "cpu", "--batches", "1", "3", "--batch-context", "80"]
    arguments += ["--contexts", "96", "8192", "--context-batches", "2", "--num-steps", "4"]
    figures = run("bench_steps.py", *arguments)
    points = {(each["num_seqs"], each["below"]): each for each in figures["steps"]}
    assert set(points) == {(3, 80), (1, 80), (2, 96)}
    for (_, below), each in points.items():
        assert below - 64 < each["context"] <= below
        assert each["step_ms"] > 0 and each["gpu_ms"] > 0
    (skipped,) = figures["skipped"]
    assert (skipped["num_seqs"], skipped["below"]) == (2, 8192)
    assert skipped["reason"] == "a sequence may have 4096 tokens"
    assert figures["model"] == "tiny-qwen3" and figures["hardware"] is None
    assert figures["preemptions"] == 0


@pytest.mark.parametrize("model, tp, expected_ms", [("8B", 1, 3.5), ("8B", 2, 2.1)])
def test_a_step_of_one_token_can_take_no_less_than_its_bytes(model, tp, expected_ms) -> None:
    limit = Limit(
        ModelConfig.from_folder(REPO / f"launch/configs/Qwen3-{model}"), tp, 4.3, 790, 400
    )
    assert limit.decode_step_s(1, 128) * 1e3 == pytest.approx(expected_ms, rel=0.02)


def test_a_decode_step_grows_by_the_bytes_of_keys_and_values_and_then_by_matmuls() -> None:
    limit = Limit(ModelConfig.from_folder(REPO / "launch/configs/Qwen3-8B"), 1, 4.3, 790)
    token_bytes = 36 * 2 * 8 * 128 * 2
    grown = limit.decode_step_s(16, 16 * 32768) - limit.decode_step_s(16, 16 * 128)
    assert grown == pytest.approx(16 * (32768 - 128) * token_bytes / 4.3e12)
    num_weights = 36 * (4096 * (6144 + 4096) + 3 * 4096 * 12288) + 151936 * 4096
    grown = limit.decode_step_s(2048, 0) - limit.decode_step_s(1024, 0)  # no attention
    assert grown == pytest.approx(2 * 1024 * num_weights / 790e12)


@pytest.mark.parametrize(
    "model, tp, expected",
    [("0.6B", 1, 36168), ("8B", 1, 12676), ("0.6B", 2, 60339), ("8B", 2, 22094), ("32B", 4, 12937)],
)
def test_the_limit_is_the_one_that_the_peers_are_held_against(model, tp, expected) -> None:
    arguments = ["--model", str(REPO / f"launch/configs/Qwen3-{model}"), "--tp", str(tp)]
    limit = run_text("limit.py", *arguments).split()[0]
    assert float(limit) == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_tuned_weights_are_all_of_a_layer(tp: int) -> None:
    config = ModelConfig.from_folder(REPO / "launch/configs/Qwen3-8B")
    shapes = {linear.name: linear.local_shape(tp) for linear in config.spec.linears()}
    assert shapes.pop("lm_head") == (151_936 // tp, 4096)
    layer = "model.layers.0."
    tensors = config.spec.shapes().items()
    sizes = [math.prod(shape) for name, shape in tensors if name.startswith(layer)]
    matmul_sizes = [size for size in sizes if size > 1e6]  # all but the norms
    assert tp * sum(N * K for N, K in shapes.values()) == sum(matmul_sizes)


def test_a_start_is_measured_with_random_weights_in_a_real_checkpoint(tmp_path: Path) -> None:
    config = json.loads((REPO / "launch/configs/Qwen3-0.6B/config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 100, "head_dim": 16}
    config |= {
        "eos_token_id": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    figures = run("bench_start.py", "--model", str(tmp_path), "--device", "cpu", "--repeats", "1")
    assert figures["checkpoint_bytes"] > 2 * 100 * 32
    times = list(figures["phases_s"].values())
    assert times == sorted(times)
    assert times[-1] == figures["ready_s"][0] > 0
    assert "loading weights" in figures["phases_s"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
