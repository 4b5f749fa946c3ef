"""The stress run of the fused sums, without GPUs: what it finds, and what it says of it."""

import json
import multiprocessing
import random
import sys
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import stress_all_reduce
from launch.stress_all_reduce import Errors, Sums, draw_chain, receive, stress
from tests.copy_streams import with_gloo_copy_streams
from tests.ranks import run_ranks
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.parallel.collectives import all_gather
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup

CPU = TPGroup.single(torch.device("cpu"))


def figures_of(monkeypatch, capsys, *arguments: str) -> tuple[dict[str, Any], bool]:
    """What the script prints in its last line, and whether it ends well."""
    monkeypatch.setattr(sys, "argv", ["stress_all_reduce.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        stress_all_reduce.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1]), not ended.value.code


def test_right_sums_pass_on_every_rank(monkeypatch, capsys) -> None:
    figures, is_well = figures_of(monkeypatch, capsys, "--calls", "30", "--max-rows", "3")
    assert is_well and figures["right"]
    (life,) = figures["lives"]
    assert [rank["wrong"] for rank in life["ranks"]] == [0, 0]
    assert all(rank["calls"] >= 30 for rank in life["ranks"])


@pytest.mark.parametrize("index, error", [(0, 0.01), (1, 1e-4), (0, torch.nan), (1, torch.nan)])
def test_one_wrong_value_of_a_normed_row_or_of_a_sum_is_found(monkeypatch, index, error) -> None:
    class Wrong(AllReduceRMSNorm):
        num_calls = 0

        def forward(
            self, x: Tensor, residual: Tensor | None = None, copy_stream: CopyStream | None = None
        ) -> tuple[Tensor, Tensor]:
            results = super().forward(x, residual, copy_stream)
            Wrong.num_calls += 1
            if Wrong.num_calls == 40:
                results[index][-1, -1] += error
            return results

    monkeypatch.setattr(stress_all_reduce, "AllReduceRMSNorm", Wrong)
    monkeypatch.setattr(stress_all_reduce, "READ_EVERY", 20)
    rounds = list(stress(CPU, 60, seed=1, max_rows=2))
    right = [each["right"] for each in rounds]
    assert right[0] and not right[-1] and rounds[-1]["wrong"] > 0
    assert not rounds[-1]["worst"] <= 1


def sums_in_lanes_are_tried(tp: TPGroup) -> None:
    """Right ones pass; of wrong ones the wrong values are found, on the rank that has them."""
    width, max_rows = stress_all_reduce.WIDTHS[0], 6
    errors = Errors(tp.device)
    sums = Sums(tp, width, errors, max_rows)
    sums.tp = sums._norm.tp = with_gloo_copy_streams(sums.tp, max_rows, width)
    numbers = random.Random(0)
    chains = [draw_chain(numbers, tp.size, max_rows) for _ in range(3)]
    for chain in chains:
        sums.run_in_lanes(chain)
    assert int(errors.wrong) == 0 < float(errors.worst)
    assert len({int(each) for each in all_gather(errors.checksum, tp)}) == 1
    sums._norm.eps = 0.1  # not what it is held against
    sums.run_in_lanes(chains[0])
    assert int(errors.wrong) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
def test_sums_in_lanes_are_tried() -> None:
    run_ranks(sums_in_lanes_are_tried, 2)


def test_a_rank_that_is_silent_or_gone_is_told_from_one_that_answers() -> None:
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    (first, to_first), (second, to_second) = pipes
    with first, second, to_second:
        to_first.send({"right": True})
        outcomes = receive([first, second], time.monotonic() + 0.01)
        assert outcomes == [{"right": True}, {"error": "hung"}]
        to_first.close()
        outcomes = receive([first, second], time.monotonic() + 60)
        assert outcomes[0] == {"error": "ended without a word"}


@pytest.mark.parametrize("last", [{"right": True}, {"right": False}, {"error": "hung"}])
def test_the_exit_code_says_whether_all_was_right(monkeypatch, capsys, last) -> None:
    outcomes: list[dict[str, Any]] = [{"right": True, "calls": 10}, last]
    monkeypatch.setattr(stress_all_reduce, "run_ranks", lambda args, life: outcomes)
    figures, is_well = figures_of(monkeypatch, capsys, "--restarts", "2")
    assert is_well == last.get("right", False)
    assert figures["calls"] == 10 * len(figures["lives"]) == (30 if is_well else 10)
