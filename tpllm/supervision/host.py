"""Host: the interface through which the coordinator's side reaches the ranks of one host.

`tpllm.supervision.local_host.LocalHost` implements it with processes on this host. A host that is
reached over a network needs an agent there, which starts a `LocalHost` and relays its records:
tests/supervision/socket_host.py does so over a socket pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tpllm.channel.ring import Buffer, Record
from tpllm.channel.step_plan import PlanLimits
from tpllm.supervision.diagnosis import RankState


@dataclass(frozen=True)
class Launch:
    """What the workers of an engine are started with, whatever their host.

    Attributes:
        world_size: number of workers
        limits: the size of the largest step, which limits the size of a record
        settings: plain data that every worker receives at its start, as JSON
        module: the module that a worker runs; tests pass another one
    """

    world_size: int
    limits: PlanLimits
    settings: dict[str, Any]
    module: str = "tpllm.worker"


class Writer(Protocol):
    def try_send(self, kind: int, buffers: Sequence[Buffer]) -> bool:
        """Send one record, or return False if there is no room for it yet."""
        ...

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there may be room again."""
        ...


class Reader(Protocol):
    def try_receive(self) -> Record | None:
        """Return the next record, or None if there is none yet."""
        ...

    def fileno(self) -> int:
        """Return a descriptor that is readable while a record waits."""
        ...


class Worker(Protocol):
    """A worker process, as far as its host knows it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Return its exit code, as `Child.poll` does, or None while it runs."""
        ...

    def is_ending(self) -> bool:
        """Whether the kernel is ending the process, whose exit code is known only afterwards."""
        ...


class Host(Protocol):
    """Some consecutive ranks of an engine, which share a host.

    What has to be released with a host stands in the engine's `ChildProcesses`. The time in an
    error report is by this machine's clock, `time.monotonic()`.

    Attributes:
        workers: the process of each rank
        plans: takes records for all of these ranks
        replies: the records that each rank sends
        ends: descriptors that become readable when a worker has ended, and stay so
    """

    @property
    def workers(self) -> Sequence[Worker]: ...
    @property
    def plans(self) -> Writer: ...
    @property
    def replies(self) -> Sequence[Reader]: ...
    @property
    def ends(self) -> Sequence[int]: ...

    def beats(self) -> int:
        """Return a counter that grows while a rank makes progress."""
        ...

    def examine(self, phases: Sequence[str]) -> list[RankState]:
        """Return the state of each of these ranks. The workers are killed afterwards.

        Args:
            phases: the phase that each rank of the engine reported last
        """
        ...
