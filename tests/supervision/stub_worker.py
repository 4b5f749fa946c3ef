"""A worker without torch, for tests of the launcher; `start` makes a group of them.

It starts as the real worker does, through `tpllm.worker.__main__.main`, and then performs the acts
that it gets: `start({0: [["say", "loading weights"], ["raise", "disk on fire"]]})`. A rank without
acts works: it reports that it is ready, then replies to every record.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tpllm.channel.progress import Progress
from tpllm.channel.ring import RingReader
from tpllm.channel.step_plan import CONTROL, PlanLimits, StepPlan, StepResult
from tpllm.errors import SettingError
from tpllm.supervision.host import Launch
from tpllm.supervision.launcher import StartHosts, WorkerGroup
from tpllm.supervision.local_host import start_local_host
from tpllm.supervision.watch import Timeouts
from tpllm.worker.__main__ import Spec, main
from tpllm.worker.replies import Replies

FOR_EVER = 1 << 30
_NO_WORDS = np.empty(0, dtype=np.int32)
READY = ["ready"]
SERVE = ["serve", FOR_EVER]
HANG = ["hang"]
NUMBERS = ("rank", "local_rank", "device", "world_size", "local_world_size")

Acts = dict[int, list[list[Any]]]


def start(
    acts: Acts | None = None,
    world_size: int = 2,
    module: str = "stub_worker",
    timeout_s: float = 60.0,
    on_phase: Callable[[int, str], None] | None = None,
    start_hosts: StartHosts = start_local_host,
) -> WorkerGroup:
    """Start stub workers; the fixture `stub_workers` makes their module importable."""
    settings = {"acts": {str(rank): each for rank, each in (acts or {}).items()}}
    timeouts = Timeouts(start_timeout_s=timeout_s, step_timeout_s=timeout_s)
    limits = PlanLimits(4, 64, 4, 16, 8, max_logprobs=20)
    launch = Launch(world_size, limits, settings, module)
    return WorkerGroup(launch, timeouts, on_phase, start_hosts)


def until_ready(group: WorkerGroup) -> WorkerGroup:
    for rank in range(group.world_size):
        reply = group.receive_control(rank)
        assert (reply["type"], reply["rank"]) == ("ready", rank)
    return group


class Stub:
    """One worker; its acts are the methods `act_*`."""

    def __init__(self, spec: Spec, plans: RingReader, replies: Replies) -> None:
        self._spec, self._plans, self._replies = spec, plans, replies
        self._progress = Progress(spec["board"], spec["local_rank"])
        self._num_steps = 0

    def perform(self) -> None:
        acts = self._spec["settings"].get("acts", {})
        for name, *args in acts.get(str(self._spec["rank"]), [READY, SERVE]):
            if getattr(self, f"act_{name}")(*args) == "shutdown":
                return

    def act_say(self, phase: str) -> None:
        self._replies.phase(phase)

    def act_ready(self) -> None:
        rank = self._spec["rank"]
        self._replies.control({"type": "ready", "rank": rank, "num_kv_blocks": 64, "info": {}})

    def act_serve(self, num_records: int) -> str | None:
        """Send every step back as its result, and reply to control messages."""
        for _ in range(num_records):
            record = self._plans.receive()
            assert record is not None
            if record.kind == CONTROL:
                message = json.loads(record.payload.tobytes())
                if message["type"] == "shutdown":
                    return "shutdown"
                self._replies.control(self._answer(message))
                continue
            self._progress.begin(self._num_steps)
            self.between_begin_and_end()
            if self._spec["rank"] == 0:
                self._replies.result([record.payload])
            self._progress.launch(self._num_steps)
            self._num_steps += 1
        return None

    def act_compute(self, step_s: float) -> str:
        """Serve an engine: a new token is 100 + the number of tokens before it."""
        while True:
            record = self._plans.receive()
            assert record is not None
            if record.kind == CONTROL:
                assert json.loads(record.payload.tobytes())["type"] == "shutdown"
                return "shutdown"
            time.sleep(step_s)
            if self._spec["rank"] == 0:
                plan = StepPlan.decode(record.payload)
                drawn = (100 + plan.starts + plan.num_tokens)[plan.samples == 1]
                self._replies.result(
                    StepResult(plan.step, plan.samples, drawn, _NO_WORDS).buffers()
                )

    def between_begin_and_end(self) -> None:
        """Do the work of a step; a stub does none."""

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["type"] == "look around":
            numbers = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
            opened = {fd: _target(fd) for fd in numbers}
            return {"argv": sys.argv, "environ": dict(os.environ), "opened": opened}
        if message["type"] == "numbers":
            return {name: self._spec[name] for name in NUMBERS}
        return {"rank": self._spec["rank"], "heard": message}

    def act_raise(self, text: str) -> None:
        raise RuntimeError(text)

    def act_refuse(self, text: str) -> None:
        raise SettingError(text)

    def act_complain(self, text: str) -> None:
        """Act as a rank that has lost a peer and does not end at once."""
        self._replies.error(text)

    def act_exit(self, code: int) -> None:
        os._exit(code)

    def act_signal_self(self, name: str) -> None:
        signal.raise_signal(signal.Signals[name])

    def act_signal_coordinator(self, name: str) -> None:
        os.kill(os.getppid(), signal.Signals[name])

    def act_seize_interpreter(self) -> None:
        """Stay in native code without end and hold the interpreter lock, so no thread runs."""
        ctypes.PyDLL(None).pause()

    def act_touch(self, path: str) -> None:
        Path(path).touch()

    def act_await(self, path: str) -> None:
        while not Path(path).exists():
            time.sleep(0.005)

    def act_hang(self) -> None:
        """Ignore all signals and messages without being stuck in native code."""
        while True:
            time.sleep(0.005)


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the descriptor of the listing itself
        return ""


def serve(spec: Spec, plans: RingReader, replies: Replies) -> None:
    Stub(spec, plans, replies).perform()


if __name__ == "__main__":
    main(serve)
