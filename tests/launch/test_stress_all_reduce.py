"""The stress test of the fused all-reduces, without GPUs: what it finds and what it reports."""

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
from launch.stress_all_reduce import Errors, FusedAllReduces, receive, sample_chain, stress
from tests.copy_streams import with_gloo_copy_streams
from tests.ranks import run_ranks
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.parallel.collectives import all_gather
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup

CPU = TPGroup.single(torch.device("cpu"))


def figures_of(monkeypatch, capsys, *arguments: str) -> tuple[dict[str, Any], bool]:
    """Return what the script prints in its last line, and whether its exit code is 0."""
    monkeypatch.setattr(sys, "argv", ["stress_all_reduce.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        stress_all_reduce.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1]), not ended.value.code


def test_correct_all_reduces_pass_on_every_rank(monkeypatch, capsys) -> None:
    figures, is_well = figures_of(monkeypatch, capsys, "--calls", "30", "--max-rows", "3")
    assert is_well and figures["right"]
    (life,) = figures["lives"]
    assert [rank["wrong"] for rank in life["ranks"]] == [0, 0]
    assert all(rank["calls"] >= 30 for rank in life["ranks"])


@pytest.mark.parametrize("index, error", [(0, 0.01), (1, 1e-4), (0, torch.nan), (1, torch.nan)])
def test_one_wrong_value_of_a_normed_row_or_of_a_residual_is_found(
    monkeypatch, index, error
) -> None:
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


def all_reduces_in_copy_streams_are_checked(tp: TPGroup) -> None:
    """Correct ones pass; the wrong values of wrong ones are found on the rank that has them."""
    width, max_rows = stress_all_reduce.WIDTHS[0], 6
    errors = Errors(tp.device)
    all_reduces = FusedAllReduces(tp, width, errors, max_rows)
    all_reduces.tp = all_reduces._norm.tp = with_gloo_copy_streams(all_reduces.tp, max_rows, width)
    numbers = random.Random(0)
    chains = [sample_chain(numbers, tp.size, max_rows) for _ in range(3)]
    for chain in chains:
        all_reduces.run_in_copy_streams(chain)
    assert int(errors.wrong) == 0 < float(errors.worst)
    assert len({int(each) for each in all_gather(errors.checksum, tp)}) == 1
    all_reduces._norm.eps = 0.1  # the check uses another epsilon
    all_reduces.run_in_copy_streams(chains[0])
    assert int(errors.wrong) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
def test_all_reduces_in_copy_streams_are_checked() -> None:
    run_ranks(all_reduces_in_copy_streams_are_checked, 2)


def test_a_hung_rank_and_an_ended_rank_are_reported_apart() -> None:
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    (first, to_first), (second, to_second) = pipes
    with first, second, to_second:
        to_first.send({"right": True})
        outcomes = receive([first, second], time.monotonic() + 0.01)
        assert outcomes == [{"right": True}, {"error": "hung"}]
        to_first.close()
        outcomes = receive([first, second], time.monotonic() + 60)
        assert outcomes[0] == {"error": "ended without figures"}


@pytest.mark.parametrize("last", [{"right": True}, {"right": False}, {"error": "hung"}])
def test_the_exit_code_shows_whether_all_was_correct(monkeypatch, capsys, last) -> None:
    outcomes: list[dict[str, Any]] = [{"right": True, "calls": 10}, last]
    monkeypatch.setattr(stress_all_reduce, "run_ranks", lambda args, life: outcomes)
    figures, is_well = figures_of(monkeypatch, capsys, "--restarts", "2")
    assert is_well == last.get("right", False)
    assert figures["calls"] == 10 * len(figures["lives"]) == (30 if is_well else 10)
