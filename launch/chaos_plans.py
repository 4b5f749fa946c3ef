"""The faults of launch/chaos.py: the acts, where they happen, and how each is reported."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

# The cause in the WorkerError of each act.
CAUSES = {
    "kill": "SIGKILL",
    "terminate": "SIGTERM",
    "crash": "SIGSEGV",
    "leave": "exit code 3",
    "fail": "RuntimeError: disk on fire",
    "stop": "hang",
    "seize": "hang",
    "stick_kernel": "hang",
    "run_out_of_memory": "ran out of memory",
}
HANGS = ("stop", "seize", "stick_kernel")
STARTING = (
    "starting",
    "importing torch",
    "joining the group",
    "loading weights",
    "measuring memory",
)
# Places that are passed more than once, and how often they are passed at least.
OCCASIONS = {"prefill": 10, "decode": 24, "replay": 24, "capture": 6}
COORDINATOR = "coordinator killed"


@dataclass(frozen=True)
class Plan:
    """One fault: the act, its place and rank, and how often the place is passed before."""

    act: str
    where: str
    rank: int
    after: int

    @property
    def name(self) -> str:
        return f"{self.act} in {self.where}"


def all_plans(size: int, device: str) -> list[Plan]:
    """Return every act in every place of every rank that is possible on this device."""
    acts = ["kill", "terminate", "crash", "leave", "fail", "stop", "seize"]
    in_steps = [*acts, "run_out_of_memory", *(["stick_kernel"] if device == "cuda" else [])]
    places = dict.fromkeys([*STARTING, "idle"], acts) | dict.fromkeys(
        ["prefill", "decode"], in_steps
    )
    if device == "cuda":
        places |= {"capture": acts, "replay": in_steps}
    return [
        Plan(act, where, rank, 0)
        for where, possible in places.items()
        for act in [*possible, COORDINATOR]
        for rank in range(size)
    ]


def spread_plans(rng: random.Random, plans: list[Plan]) -> Iterator[Plan]:
    """Yield the plans in random order, without end, with random `after`.

    In any prefix of the sequence, every act, place and rank occurs about equally often, and no plan
    repeats before all plans have occurred.
    """
    while True:
        left = rng.sample(plans, len(plans))
        seen: Counter[object] = Counter()
        while left:
            plan = min(left, key=lambda plan: sum(seen[each] for each in _traits(plan)))
            left.remove(plan)
            seen.update(_traits(plan))
            yield replace(plan, after=rng.randrange(OCCASIONS.get(plan.where, 1)))


def _traits(plan: Plan) -> tuple[object, ...]:
    return plan.act, plan.where, plan.rank, plan.name
