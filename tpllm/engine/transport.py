"""Transport: how a coordinator speaks to its workers, wherever they run.

The coordinator is given one (`tpllm.supervision.launcher.WorkerGroup` over shared memory), so that
scheduling knows nothing of processes, and another way to reach the workers changes nothing here.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from tpllm.channel.ring import Buffer, Record


class Transport(Protocol):
    """The workers of one engine, as the coordinator sees them.

    Raises:
        WorkerError: by any method, when a worker has failed; nothing of the engine is left then.
        SettingError: a worker refused a setting; likewise.
        RuntimeError: the engine has been closed, also by another thread in the middle of a call.
    """

    world_size: int

    @property
    def pids(self) -> list[int]:
        """The process id of each rank's worker."""
        ...

    @property
    def closed(self) -> bool: ...

    def note_ready(self) -> None:
        """Every worker has said that it is ready: from now on a deadline is that of a step."""
        ...

    def send(self, kind: int, buffers: Sequence[Buffer], step: int | None = None) -> None:
        """Broadcast one record to every worker."""
        ...

    def send_control(self, message: dict[str, Any]) -> None:
        """Broadcast a message as JSON: what is rare and small."""
        ...

    def receive(self, rank: int, kind: int) -> Record:
        """Return the next record of `kind` from `rank`; sleep until it comes."""
        ...

    def receive_control(self, rank: int) -> dict[str, Any]:
        """Return the next message from `rank`; sleep until it comes."""
        ...

    def sleep_until_readable(self, *fds: int) -> None:
        """Sleep while nothing runs, until one of `fds` can be read."""
        ...

    def health(self) -> list[dict[str, Any]]:
        """Return for each rank its rank and pid, its phase, and whether it lives."""
        ...

    def close(self) -> None:
        """Ask the workers to end, then see to it. Harmless when repeated."""
        ...

    def kill(self) -> None:
        """End the workers at once."""
        ...
