"""Messages of a worker to the coordinator: results of steps, phases of the start, and errors."""

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from tpllm.channel.ring import Buffer, RingWriter
from tpllm.channel.step_plan import CONTROL, RESULT

_TIMEOUT_S = 60.0


class Replies:
    """The worker's ring to the coordinator, which all threads of the worker may use."""

    def __init__(self, writer: RingWriter) -> None:
        self._writer = writer
        self._lock = threading.Lock()

    def result(self, buffers: Sequence[Buffer]) -> None:
        with self._lock:
            self._writer.send(RESULT, buffers, _TIMEOUT_S)

    def control(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._writer.send(CONTROL, [json.dumps(message).encode()], _TIMEOUT_S)

    def phase(self, name: str) -> None:
        """Report what this rank does now; the coordinator names it in a later error."""
        self.control({"phase": name})

    def error(self, text: str, *, setting: bool = False) -> None:
        """Report a traceback; if it is too long, only its end is sent, which names the cause.

        `setting` marks a message about a setting, which the caller sees unchanged. All ranks share
        a clock, so the time identifies the rank that failed first.
        """
        max_length = self._writer.slot_bytes // 12 - 64  # JSON takes up to 12 bytes per character
        text = text[-max_length:].strip()
        message = {"error": text, "setting": setting, "time": time.monotonic()}
        self.control(message)
