"""Tests of faults in real workers with the shipped model: 30 combinations of act, place and rank.

Workers are forked, since importing torch would take most of the time; `launch/chaos.py --product`
does all cases with fresh interpreters.
"""

import json
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from launch import forked_workers
from launch.chaos import Chaos
from launch.chaos_plans import HANGS, Plan
from tests.leaks import process_state, wait_until
from tpllm import LLM
from tpllm.config.checkpoint import resolve_model
from tpllm.config.checkpoint_files import WEIGHTS_NAME
from tpllm.supervision import processes
from tpllm.supervision.watch import Watch

ACTS = ("kill", "crash", "fail", "leave", "stop", "seize")
PLACES = ("joining the group", "loading weights", "prefill", "decode", "idle")
NORM = "model.layers.1.input_layernorm.weight"
RANKS = ((0, 1), (0, 2), (1, 2))
CASES = [
    (act, where, *RANKS[(i + j) % len(RANKS)])
    for i, act in enumerate(ACTS)
    for j, where in enumerate(PLACES)
]


@pytest.fixture(scope="module")
def trials() -> Iterator[dict[int, Chaos]]:
    """Return the chaos rounds for one and two ranks, with the outputs of an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_start", forked_workers.start)
        patch.setenv("CHAOS_RUN", "tests")
        arguments = {"seed": 0, "model": None, "device": "cpu", "timeout_s": 60.0, "fork": True}
        yield {size: Chaos(Namespace(**arguments, tensor_parallel_size=size)) for size in (1, 2)}


@pytest.mark.parametrize("act, where, rank, size", CASES)
def test_a_fault_is_reported_and_leaves_nothing(act, where, rank, size, trials, monkeypatch):
    if act in HANGS:
        lose_patience_once_it_has_happened(monkeypatch, act)
    monkeypatch.setenv("CHAOS_FAULT", "{}")  # so that monkeypatch restores it
    outcome = trials[size].run(Plan(act, where, rank, after=2 if where == "decode" else 0))
    assert outcome.wrong == []
    assert outcome.leaks == []


def test_a_checkpoint_with_a_nan_is_reported_by_tensor_and_leaves_nothing(trials, tmp_path):
    folder = shutil.copytree(resolve_model(None), tmp_path / "model")
    weights = folder / WEIGHTS_NAME
    with safe_open(weights, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors[NORM][5] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=f"{NORM} holds NaN or infinity in 1 of 256 values"):
        LLM(folder, device="cpu", tensor_parallel_size=2)


def test_an_idle_engine_never_wakes_up(trials):
    """No thread of the worker is scheduled even once while the engine is idle.

    With several ranks, Gloo's own threads poll a hundred times per second.
    """

    def wake_ups(pid: int) -> list[str]:
        return [
            line
            for task in sorted(Path(f"/proc/{pid}/task").iterdir())
            for line in (task / "status").read_text().splitlines()
            if "ctxt_switches" in line
        ]

    def is_quiet(llm: LLM) -> bool:
        before = [wake_ups(pid) for pid in llm.worker_pids]
        time.sleep(0.3)
        return before == [wake_ups(pid) for pid in llm.worker_pids]

    with LLM(device="cpu", skip_tokenizer_init=True) as llm:
        llm.generate([1, 2, 3], use_tqdm=False)
        assert wait_until(lambda: is_quiet(llm))


def lose_patience_once_it_has_happened(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Make the deadline pass as soon as the fault has occurred."""

    def remaining_s(watch: Watch) -> float:
        happened = Path(json.loads(os.environ["CHAOS_FAULT"])["mark"]).exists()
        if act == "stop":
            children = [
                int(pid)
                for file in Path("/proc/self/task").glob("*/children")
                for pid in file.read_text().split()
            ]
            happened = happened and "T" in map(process_state, children)
        return -1.0 if happened else 0.05

    monkeypatch.setattr(Watch, "remaining_s", remaining_s)
