"""What the workers have said: records until somebody asks for them, phases, and complaints."""

import json
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tpllm.channel.ring import Record, RingReader
from tpllm.channel.step_plan import CONTROL


class Complaint(NamedTuple):
    """What a worker said of its failure."""

    time: float  # time.monotonic(), one clock for all processes
    rank: int
    text: str
    is_setting: bool  # it is about a setting: the text alone tells the caller everything


class Inbox:
    """Takes in what comes through the ring of each rank.

    Attributes:
        readers: of these rings, in rank order
        phases: what each rank said last that it does
        complaints: what ranks have said of their failures
    """

    def __init__(self, world_size: int, on_phase: Callable[[int, str], None] | None) -> None:
        self.readers: list[RingReader] = []
        self.phases = ["starting"] * world_size
        self.complaints: list[Complaint] = []
        self._on_phase = on_phase
        self._records: deque[tuple[int, Record]] = deque()

    def collect(self) -> bool:
        """Take in what has come; False where nothing has."""
        any_came = False
        for rank, reader in enumerate(self.readers):
            while (record := reader.try_receive()) is not None:
                any_came = True
                self._take(rank, record)
        return any_came

    def pop(self, rank: int, kind: int) -> Record | None:
        """The first record of `kind` from `rank` that nobody has had, if there is one."""
        for item in self._records:
            if item[0] == rank and item[1].kind == kind:
                self._records.remove(item)
                return item[1]
        return None

    def _take(self, rank: int, record: Record) -> None:
        message = json.loads(record.payload.tobytes()) if record.kind == CONTROL else {}
        if "error" in message:
            self.complaints.append(
                Complaint(message["time"], rank, message["error"], message["setting"])
            )
        elif "phase" in message:
            self.phases[rank] = message["phase"]
            if self._on_phase:
                self._on_phase(rank, message["phase"])
        else:
            self._records.append((rank, record))
