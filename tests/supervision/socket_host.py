"""A second kind of host: an agent, reached over a socket pair, starts its ranks and relays records.

`SocketHost` is the engine's end. The agent is a process, `python -m tests.supervision.socket_host`,
that runs a `LocalHost` of its own, as one on another machine would. Each message is a map of plain
data (`tpllm.supervision.connection`).
"""

import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn

import numpy as np

from tpllm.channel.child_process import begin_child
from tpllm.channel.progress import create_board
from tpllm.channel.ring import Buffer, Record, wait_readable
from tpllm.channel.step_plan import CONTROL, PlanLimits
from tpllm.supervision.connection import Connection, Message
from tpllm.supervision.diagnosis import RankState
from tpllm.supervision.host import Host, Launch
from tpllm.supervision.local_host import LocalHost
from tpllm.supervision.processes import ChildProcesses, open_output

_DEADLINE_S = 60.0
_BEAT_S = 0.05


def start_on_two_hosts(launch: Launch, processes: ChildProcesses) -> list[Host]:
    """Start the first half of the ranks behind an agent, and the others on this host.

    The setting "meeting" names a board that all ranks share, for `fault_worker`.
    """
    board = processes.keep(create_board(launch.world_size))
    launch.settings["meeting"] = f"/proc/{os.getpid()}/fd/{board}"
    half = launch.world_size // 2
    return [
        SocketHost(launch, range(half), processes),
        LocalHost(launch, range(half, launch.world_size), processes),
    ]


@dataclass
class AgentsWorker:
    pid: int
    exit_code: int | None = None

    def poll(self) -> int | None:
        return self.exit_code

    def is_ending(self) -> bool:
        return False


class Replies:
    """Records of one rank, which a thread puts here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd  # an eventfd that counts the records
        self._records: deque[Record] = deque()

    def fileno(self) -> int:
        return self._fd

    def put(self, kind: int, payload: bytes) -> None:
        self._records.append(Record(kind, np.frombuffer(payload, np.uint8)))
        os.eventfd_write(self._fd, 1)

    def try_receive(self) -> Record | None:
        if not self._records:
            return None
        os.eventfd_read(self._fd)
        return self._records.popleft()


class SocketHost:
    """A `Host` behind an agent. It is its own writer of plans."""

    def __init__(self, launch: Launch, ranks: range, processes: ChildProcesses) -> None:
        self._ranks = ranks
        self._beats = 0
        self.workers: list[AgentsWorker] = []
        self._answers: SimpleQueue[Message | None] = SimpleQueue()  # None: the agent is gone
        flags = os.EFD_CLOEXEC | os.EFD_SEMAPHORE
        self.replies = [Replies(processes.keep(os.eventfd(0, flags))) for _ in ranks]
        self.ends = [processes.keep(os.eventfd(0, flags))]
        spec = {"ranks": [ranks.start, ranks.stop], "launch": asdict(launch)}
        output = open_output(processes)
        self.agent, ours = processes.start_connected(__name__, spec, output)
        self._connection = Connection(ours)
        self._reader = Thread(target=self._read, name="tpllm-socket-host", daemon=True)
        processes.keep_open(self)
        self._reader.start()
        assert self._answers.get(timeout=_DEADLINE_S) is not None, "the agent has ended"
        self.plans = self

    def try_send(self, kind: int, buffers: Sequence[Buffer]) -> bool:
        parts = [each if isinstance(each, bytes) else each.tobytes() for each in buffers]
        self._connection.send({"type": "record", "kind": kind, "payload": b"".join(parts)})
        return True

    def fileno(self) -> int:
        return self._connection.fileno()

    def beats(self) -> int:
        return self._beats

    def examine(self, phases: Sequence[str]) -> list[RankState]:
        self._connection.send({"type": "examine", "phases": list(phases)})
        answer = self._answers.get(timeout=_DEADLINE_S)
        if answer is None:
            pids = [worker.pid for worker in self.workers]
            states = zip(self._ranks, pids, strict=True)
            return [RankState(r, pid, phases[r], -1, -1, "unknown", "") for r, pid in states]
        return [RankState(**state) for state in answer["states"]]

    def close(self) -> None:
        self._connection.close()
        self._reader.join()

    def _read(self) -> None:
        """Run the thread that receives what the agent sends."""
        try:
            while True:
                for message in self._connection.receive(_DEADLINE_S):
                    self._take(message)
        except EOFError:
            lost = {"error": "the agent is gone", "setting": False, "time": time.monotonic()}
            self.replies[0].put(CONTROL, json.dumps(lost).encode())
            self._answers.put(None)

    def _take(self, message: Message) -> None:
        if message["type"] == "record":
            rank = message["rank"] - self._ranks.start
            self.replies[rank].put(message["kind"], message["payload"])
        elif message["type"] == "exit":
            self.workers[message["rank"] - self._ranks.start].exit_code = message["code"]
            os.eventfd_write(self.ends[0], 1)
        elif message["type"] == "beats":
            self._beats = message["beats"]
        else:
            if message["type"] == "pids":  # here: the next message may be of an exit
                self.workers = [AgentsWorker(pid) for pid in message["pids"]]
            self._answers.put(message)


# ---- the agent -----------------------------------------------------------------------------------


class Agent:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._connection = Connection(socket.socket(fileno=spec["socket"]))
        launch = Launch(**{**spec["launch"], "limits": PlanLimits(**spec["launch"]["limits"])})
        self._ranks = range(*spec["ranks"])
        self._host = LocalHost(launch, self._ranks, ChildProcesses())
        self._running = set(self._ranks)
        self._connection.send({"type": "pids", "pids": [each.pid for each in self._host.workers]})

    def run(self) -> None:
        """Relay records until all workers have ended or the engine is gone."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        for replies in self._host.replies:
            poll.register(replies, select.POLLIN)
        beats = 0
        while self._running:
            poll.poll(_BEAT_S * 1e3)
            self._relay_exits()
            if self._host.beats() != beats:
                beats = self._host.beats()
                self._connection.send({"type": "beats", "beats": beats})
            for message in self._connection.receive(timeout_s=0):
                self._handle(message)
        self._connection.flush(_DEADLINE_S)

    def _handle(self, message: Message) -> None:
        if message["type"] == "record":
            while not self._host.plans.try_send(message["kind"], [message["payload"]]):
                wait_readable(self._host.plans.fileno(), 0.1)
        else:
            states = self._host.examine(message["phases"])
            self._connection.send({"type": "states", "states": [asdict(each) for each in states]})

    def _relay_exits(self) -> None:
        codes = [worker.poll() for worker in self._host.workers]
        for rank, replies in zip(self._ranks, self._host.replies, strict=True):
            while (record := replies.try_receive()) is not None:
                payload = record.payload.tobytes()
                self._connection.send(
                    {"type": "record", "rank": rank, "kind": record.kind, "payload": payload}
                )
        for rank, code in zip(self._ranks, codes, strict=True):
            if code is not None and rank in self._running:
                self._running.remove(rank)
                self._connection.send({"type": "exit", "rank": rank, "code": code})


def serve(spec: dict[str, Any]) -> None:
    Agent(spec).run()


def main(serve: Any = serve) -> NoReturn:
    spec = begin_child()
    serve(spec)
    os._exit(0)


if __name__ == "__main__":
    main()
