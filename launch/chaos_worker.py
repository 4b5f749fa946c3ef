"""A real worker with one fault, injected as CHAOS_FAULT describes; see chaos.py.

    CHAOS_FAULT='{"rank": 1, "where": "decode", "after": 3, "act": "kill", "mark": "/tmp/mark"}'

The engine runs this module in place of `tpllm.worker`. `where` is a phase of the start, or
"prefill", "decode", "replay" (of a CUDA graph), "capture", "idle" or "closing"; the fault happens
there after `after` passes. Its time is written to the file `mark`, by the clock that all processes
share.
"""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpllm.channel.ring import RingReader
from tpllm.worker.__main__ import Spec, main
from tpllm.worker.__main__ import serve as serve_steps
from tpllm.worker.replies import Replies

ACTS: dict[str, Callable[[], None]] = {}


def act(function: Callable[[], None]) -> Callable[[], None]:
    ACTS[function.__name__] = function
    return function


@act
def kill() -> None:
    signal.raise_signal(signal.SIGKILL)


@act
def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@act
def crash() -> None:
    ctypes.string_at(0)


@act
def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@act
def leave() -> None:
    os._exit(3)


@act
def fail() -> None:
    raise RuntimeError("disk on fire")


@act
def seize() -> None:
    """Block for ever in native code that holds the interpreter's lock."""
    ctypes.PyDLL(None).pause()


@act
def run_out_of_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    raise MemoryError


@act
def stick_kernel() -> None:
    """Keep the GPU busy for ever."""
    import torch

    torch.cuda._sleep(1 << 62)


class Fault:
    """The fault of this rank, if it has one."""

    def __init__(self, rank: int) -> None:
        spec: dict[str, Any] = json.loads(os.environ.get("CHAOS_FAULT", "{}"))
        self._here = spec.get("rank") == rank
        self._where = spec.get("where")
        self._left = spec.get("after", 0)
        self._act = ACTS[spec.get("act", "fail")]
        self._mark = Path(spec.get("mark", os.devnull))

    def pass_by(self, where: str) -> None:
        """Inject the fault if it belongs to this place."""
        if not self._here or where != self._where:
            return
        if self._left > 0:
            self._left -= 1
            return
        self._here = False
        self._mark.write_text(repr(time.monotonic()))
        self._act()


def serve(spec: Spec, plans: RingReader, replies: Replies) -> None:
    fault = Fault(spec["rank"])
    say = replies.phase

    def phase(name: str) -> None:
        say(name)
        if name == "joining the group":  # torch is imported; faults may come before its import
            _watch_steps(fault)
        fault.pass_by(name)

    replies.phase = phase  # type: ignore[method-assign]
    fault.pass_by("starting")
    _watch_control(plans, fault)
    serve_steps(spec, plans, replies)


def _watch_control(plans: RingReader, fault: Fault) -> None:
    """Inject faults between steps, and when the coordinator closes the engine."""
    from tpllm.channel.step_plan import CONTROL

    receive = plans.receive

    def receive_and_fail(*args: Any, **kwargs: Any) -> Any:
        fault.pass_by("idle")
        record = receive(*args, **kwargs)
        if record is not None and record.kind == CONTROL:
            fault.pass_by("closing")
        return record

    plans.receive = receive_and_fail  # type: ignore[method-assign]


def _watch_steps(fault: Fault) -> None:
    import torch

    from tpllm.worker.cuda_graphs import GraphPool
    from tpllm.worker.model_runner import ModelRunner

    run, capture, replay = ModelRunner.run, GraphPool.capture, torch.cuda.CUDAGraph.replay

    def run_and_fail(self: ModelRunner, plan: Any, *args: Any) -> Any:
        if plan.step >= 0:  # not a warm-up step
            fault.pass_by("decode" if plan.num_decode == plan.rows.size else "prefill")
        return run(self, plan, *args)

    def capture_and_fail(self: GraphPool, step: Callable[[], torch.Tensor]) -> Any:
        def step_and_fail() -> torch.Tensor:
            result = step()
            if torch.cuda.is_current_stream_capturing():
                fault.pass_by("capture")
            return result

        return capture(self, step_and_fail)

    def replay_and_fail(self: torch.cuda.CUDAGraph) -> None:
        fault.pass_by("replay")
        replay(self)

    ModelRunner.run = run_and_fail  # type: ignore[method-assign]
    GraphPool.capture = capture_and_fail  # type: ignore[method-assign]
    torch.cuda.CUDAGraph.replay = replay_and_fail  # type: ignore[method-assign]


if __name__ == "__main__":
    main(serve)
