"""Messages of the workers: phases, error reports, and records that wait to be taken."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tpllm.channel.ring import Record
from tpllm.channel.step_plan import CONTROL
from tpllm.supervision.host import Reader


class ErrorReport(NamedTuple):
    """A worker's own report of its failure."""

    time: float  # time.monotonic(), one clock for all processes
    rank: int
    text: str
    is_setting: bool  # a setting was refused: the caller needs only the text


class Inbox:
    """Receives what the ranks send.

    Attributes:
        readers: what each rank sends, in rank order
        phases: the phase that each rank reported last
        error_reports: the failures that ranks have reported
    """

    def __init__(
        self, readers: Sequence[Reader], on_phase: Callable[[int, str], None] | None
    ) -> None:
        self.readers = readers
        self.phases = ["starting"] * len(readers)
        self.error_reports: list[ErrorReport] = []
        self._on_phase = on_phase
        self._records: deque[tuple[int, Record]] = deque()

    def collect(self) -> bool:
        """Receive everything that has come; return False if nothing has."""
        any_came = False
        for rank, reader in enumerate(self.readers):
            while (record := reader.try_receive()) is not None:
                any_came = True
                self._take(rank, record)
        return any_came

    def pop(self, rank: int, kind: int) -> Record | None:
        """Remove and return the first record of `kind` from `rank`, or None if there is none."""
        for item in self._records:
            if item[0] == rank and item[1].kind == kind:
                self._records.remove(item)
                return item[1]
        return None

    def _take(self, rank: int, record: Record) -> None:
        message = json.loads(record.payload.tobytes()) if record.kind == CONTROL else {}
        if "error" in message:
            self.error_reports.append(
                ErrorReport(message["time"], rank, message["error"], message["setting"])
            )
        elif "phase" in message:
            self.phases[rank] = message["phase"]
            if self._on_phase:
                self._on_phase(rank, message["phase"])
        else:
            self._records.append((rank, record))
