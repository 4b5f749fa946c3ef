"""Faults in real workers with the shipped model: 30 cases, every pair of act, place and rank.

Workers are forked, since importing torch would take most of the time; `launch/chaos.py --product`
does all cases with fresh interpreters.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import forked_workers
from launch.chaos import HANGS, Chaos, Plan
from tests.leaks import process_state
from tpllm.engine import processes
from tpllm.engine.launcher import WorkerGroup

ACTS = ("kill", "crash", "fail", "leave", "stop", "seize")
PLACES = ("joining the group", "loading weights", "prefill", "decode", "idle")
RANKS = ((0, 1), (0, 2), (1, 2))
CASES = [
    (act, where, *RANKS[(i + j) % len(RANKS)])
    for i, act in enumerate(ACTS)
    for j, where in enumerate(PLACES)
]


@pytest.fixture(scope="module")
def trials() -> Iterator[dict[int, Chaos]]:
    """Rounds of chaos for one rank and for two, with their quiet answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(forked_workers.__file__).parent)
        patch.setattr(processes, "_start", forked_workers.start)
        patch.setenv("CHAOS_RUN", "tests")
        arguments = {"seed": 0, "model": None, "device": "cpu", "timeout_s": 60.0, "fork": True}
        yield {size: Chaos(Namespace(**arguments, tensor_parallel_size=size)) for size in (1, 2)}


@pytest.mark.parametrize("act, where, rank, size", CASES)
def test_a_fault_is_told_and_leaves_nothing(act, where, rank, size, trials, monkeypatch):
    if act in HANGS:
        lose_patience_once_it_has_happened(monkeypatch, act)
    monkeypatch.setenv("CHAOS_FAULT", "{}")  # to be put back
    outcome = trials[size].run(Plan(act, where, rank, after=2 if where == "decode" else 0))
    assert outcome.wrong == []
    assert outcome.leaks == []


def lose_patience_once_it_has_happened(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Let the deadline pass when the fault is there, whatever the time is then."""

    def patience_s(group: WorkerGroup) -> float:
        happened = Path(json.loads(os.environ["CHAOS_FAULT"])["mark"]).exists()
        if act == "stop":
            happened = happened and "T" in map(process_state, group.pids)
        return -1.0 if happened else 0.05

    monkeypatch.setattr(WorkerGroup, "_patience_s", patience_s)
