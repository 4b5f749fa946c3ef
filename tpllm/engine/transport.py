"""Transport: the interface through which a coordinator reaches its workers.

`tpllm.supervision.launcher.WorkerGroup` implements it, on one host or several. The coordinator
takes one as an argument, so that scheduling does not depend on processes.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from tpllm.channel.ring import Buffer, Record


class Transport(Protocol):
    """The workers of one engine, as the coordinator sees them.

    Raises:
        WorkerError: any method raises it when a worker has failed; all processes have ended then.
        SettingError: a worker refused a setting; all processes have ended then.
        RuntimeError: the engine is closed, possibly by another thread during a call.
    """

    world_size: int

    @property
    def pids(self) -> list[int]:
        """The process id of each rank's worker."""
        ...

    @property
    def closed(self) -> bool: ...

    def note_ready(self) -> None:
        """Record that every worker is ready: the deadlines of steps apply from now on."""
        ...

    def send(self, kind: int, buffers: Sequence[Buffer], step: int | None = None) -> None:
        """Broadcast one record to every worker."""
        ...

    def send_control(self, message: dict[str, Any]) -> None:
        """Broadcast a message as JSON. It is meant for small and rare messages."""
        ...

    def receive(self, rank: int, kind: int) -> Record:
        """Sleep until the next record of `kind` comes from `rank` or a worker fails; return it."""
        ...

    def receive_control(self, rank: int) -> dict[str, Any]:
        """Sleep until the next message comes from `rank`, and return it."""
        ...

    def sleep_until_readable(self, *fds: int) -> None:
        """Sleep until one of `fds` is readable or a worker fails. No step may be in flight."""
        ...

    def health(self) -> list[dict[str, Any]]:
        """Return rank, pid, last phase and whether the process is alive, for each rank."""
        ...

    def close(self) -> None:
        """Shut the workers down, and kill those that do not end. It may be called repeatedly."""
        ...

    def kill(self) -> None:
        """Kill the workers at once."""
        ...
