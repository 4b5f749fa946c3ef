"""The engine's process with workers that need no torch: `python -m stub_engine FD`.

The workers are forked. An environment variable holds their acts as JSON: see `stub_worker`.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from launch import forked_workers
from tpllm.channel.step_plan import PlanLimits
from tpllm.supervision import engine_process, processes, start
from tpllm.supervision.launcher import WorkerGroup
from tpllm.supervision.watch import Timeouts

ACTS = "TPLLM_TEST_ACTS"


def start_stubs(
    world_size: int,
    limits: PlanLimits,
    settings: dict[str, Any],
    timeouts: Timeouts,
    module: str,
    on_phase: Callable[[int, str], None] | None,
) -> WorkerGroup:
    acts = json.loads(os.environ.get(ACTS, "{}"))
    # the key of a rank without an act: it works normally
    each = {str(r): acts.get(str(r), [["ready"], ["compute", 0.0]]) for r in range(world_size)}
    return WorkerGroup(world_size, limits, {"acts": each}, timeouts, "stub_worker", on_phase)


if __name__ == "__main__":
    vars(start)["WorkerGroup"] = start_stubs
    processes._start = forked_workers.start  # an interpreter for each would take most of the time
    engine_process.main()
