"""What a worker says to the coordinator: results of steps, progress, and what went wrong."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from tpllm.channel.ring import Part, RingWriter
from tpllm.channel.step_plan import CONTROL, RESULT

_TIMEOUT_S = 60.0


class Replies:
    """The worker's ring back to the coordinator, for all of its threads."""

    def __init__(self, writer: RingWriter) -> None:
        self._writer = writer
        self._lock = threading.Lock()

    def result(self, parts: Sequence[Part]) -> None:
        with self._lock:
            self._writer.send(RESULT, parts, _TIMEOUT_S)

    def control(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._writer.send(CONTROL, [json.dumps(message).encode()], _TIMEOUT_S)

    def phase(self, name: str) -> None:
        """What this rank does now; a later failure is reported with it."""
        self.control({"phase": name})

    def error(self, text: str, *, setting: bool = False) -> None:
        """Report a traceback; its end, where the cause stands, is what survives a cut.

        `setting` marks a message about a setting, to be shown to the caller as it is. The time
        tells the first rank that failed from those that failed of it: all share one clock.
        """
        room = self._writer.slot_bytes // 12 - 64  # JSON needs up to 12 bytes for a character
        message = {"error": text[-room:].strip(), "setting": setting, "time": time.monotonic()}
        self.control(message)
