"""The engine's process with workers that need no torch: `python -m stub_engine FD`.

The workers are forked. An environment variable holds their acts as JSON: see `stub_worker`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace

from launch import forked_workers
from tpllm.supervision import engine_process, processes, start
from tpllm.supervision.host import Launch
from tpllm.supervision.launcher import WorkerGroup
from tpllm.supervision.watch import Timeouts

ACTS = "TPLLM_TEST_ACTS"


def start_stubs(
    launch: Launch, timeouts: Timeouts, on_phase: Callable[[int, str], None] | None
) -> WorkerGroup:
    acts = json.loads(os.environ.get(ACTS, "{}"))
    # the key of a rank without an act: it works normally
    ranks = map(str, range(launch.world_size))
    each = {rank: acts.get(rank, [["ready"], ["compute", 0.0]]) for rank in ranks}
    launch = replace(launch, settings={"acts": each}, module="stub_worker")
    return WorkerGroup(launch, timeouts, on_phase)


if __name__ == "__main__":
    vars(start)["WorkerGroup"] = start_stubs
    processes._start = forked_workers.start  # an interpreter for each would take most of the time
    engine_process.main()
