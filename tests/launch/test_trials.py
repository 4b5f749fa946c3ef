"""The scripts that test the engine's reliability run and report what they found."""

import random
from collections import Counter
from itertools import islice

from launch.chaos_plans import CAUSES, COORDINATOR, HANGS, all_plans, spread_plans
from tests.launch.test_benchmarks import run


def test_a_round_of_chaos_is_reported_in_figures() -> None:
    arguments = ["--fork", "--faults", "1", "--tensor-parallel-size", "1", "--seed", "3"]
    figures = run("chaos.py", *arguments)
    assert (figures["faults"], figures["detected"], figures["leaks"]) == (1, 1, 0)


def test_a_soak_is_reported_in_figures() -> None:
    figures = run("soak.py", "--requests", "200", "--tensor-parallel-size", "1")
    assert (figures["requests"], figures["wrong"]) == (200, [])


def test_every_rank_has_every_fault_in_every_place() -> None:
    plans = all_plans(2, "cuda")
    assert len(set(plans)) == len(plans)
    assert {plan.rank for plan in plans} == {0, 1}
    assert {*HANGS, COORDINATOR, "run_out_of_memory"} < {plan.act for plan in plans}
    assert {"capture", "replay"} < {plan.where for plan in plans}
    assert not {"capture", "replay"} & {plan.where for plan in all_plans(2, "cpu")}


def test_few_rounds_have_every_act_place_and_rank_about_as_often() -> None:
    plans = all_plans(2, "cuda")
    sampled = list(islice(spread_plans(random.Random(0), plans), 40))
    for trait in ("act", "where", "rank"):
        counts = Counter(getattr(plan, trait) for plan in sampled)
        assert len(counts) == len({getattr(plan, trait) for plan in plans})
        assert max(counts.values()) - min(counts.values()) <= 2
    assert {plan.act for plan in sampled} == {*CAUSES, COORDINATOR}


def test_no_fault_repeats_before_all_have_run() -> None:
    plans = all_plans(2, "cuda")
    sampled = list(islice(spread_plans(random.Random(0), plans), len(plans)))
    assert {(plan.name, plan.rank) for plan in sampled} == {(p.name, p.rank) for p in plans}
