"""The scripts that try the engine's reliability run, and say what they found."""

from launch.chaos import COORDINATOR, HANGS, all_plans
from tests.launch.test_benchmarks import run


def test_a_round_of_chaos_is_told_in_figures() -> None:
    arguments = ["--fork", "--faults", "1", "--tensor-parallel-size", "1", "--seed", "3"]
    figures = run("chaos.py", *arguments)
    assert (figures["faults"], figures["detected"], figures["leaks"]) == (1, 1, 0)


def test_a_soak_is_told_in_figures() -> None:
    figures = run("soak.py", "--requests", "200", "--tensor-parallel-size", "1")
    assert (figures["requests"], figures["wrong"]) == (200, [])


def test_every_rank_has_every_fault_in_every_place() -> None:
    plans = all_plans(2, "cuda")
    assert len(set(plans)) == len(plans)
    assert {plan.rank for plan in plans} == {0, 1}
    assert {*HANGS, COORDINATOR, "run_out_of_memory"} < {plan.act for plan in plans}
    assert {"capture", "replay"} < {plan.where for plan in plans}
    assert not {"capture", "replay"} & {plan.where for plan in all_plans(2, "cpu")}
