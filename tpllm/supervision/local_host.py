"""Ranks on this host: one process each, started with all that it needs to join its engine.

A worker is `python -m tpllm.worker`. A fresh interpreter needs neither torchrun nor a main guard,
and works from a notebook or a script on standard input. A worker inherits its ring descriptors and
a pidfd of this process, and reads everything else from an anonymous file. However this process
ends, the kernel kills the workers. However a worker ends, its pidfd becomes readable here.
"""

import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpllm.channel.progress import Board, create_board
from tpllm.channel.ring import RingDescriptors, RingReader, RingWriter, create_ring
from tpllm.config.resources import refuse_too_few_descriptors, refuse_too_little_room
from tpllm.supervision.diagnosis import RankState, examine
from tpllm.supervision.host import Launch
from tpllm.supervision.processes import ChildProcesses, Command, open_output

CONTROL_BYTES = 1 << 16  # room for any control record; the worker truncates longer tracebacks
_NUM_SLOTS = 8


class LocalHost:
    """A `Host` whose workers are child processes, reached through rings in shared memory.

    One ring carries plans and control records to all workers. Each worker replies on its own ring.

    A worker has three numbers: `rank` in the engine; `local_rank` on this host, which is its reader
    of the plans and its line of the board; and `device`, the number of its GPU.

    Args:
        ranks: the ranks to start here
        processes: takes the workers and everything else that has to be released with them

    Raises:
        SettingError: this host lacks a resource.
    """

    def __init__(self, launch: Launch, ranks: range, processes: ChildProcesses) -> None:
        self._launch = launch
        self._ranks = ranks
        self._processes = processes
        output = open_output(processes)
        refuse_too_few_descriptors(len(ranks))
        refuse_too_little_room(tempfile.gettempdir())
        # only an unpredictable name: the workers create the directory, after the start of the guard
        # that removes it even if this process is killed
        processes.directory = Path(tempfile.gettempdir()) / f"tpllm-{secrets.token_hex(8)}"
        reading_end, lifeline = os.pipe()
        processes.descriptors += (reading_end, lifeline)
        plans = self._make_ring(len(ranks), launch.limits.plan_bytes, launch.limits.masks_bytes)
        self.plans = processes.keep_open(RingWriter(plans))
        board = processes.keep(create_board(len(ranks)))
        self._board = processes.keep_open(Board(board))
        self.replies: list[RingReader] = []
        self._stack_fds: list[int] = []
        shared = {"lifeline": lifeline, "board": board, "plans": plans.all()}
        commands = [self._command(local_rank, shared) for local_rank in range(len(ranks))]
        self.workers = processes.spawn(commands, output, reading_end)
        for fd in (reading_end, lifeline):  # from now on only the workers hold its writing end
            processes.descriptors.remove(fd)
            os.close(fd)
        self.ends = [processes.keep(os.pidfd_open(worker.pid)) for worker in self.workers]

    def _make_ring(self, num_readers: int, *record_bytes: int) -> RingDescriptors:
        """Make a ring for records of these sizes and for control records."""
        ring = create_ring(num_readers, _NUM_SLOTS, max(*record_bytes, CONTROL_BYTES))
        self._processes.descriptors += ring.all()
        return ring

    def _command(self, local_rank: int, shared: dict[str, Any]) -> Command:
        """Return the command that starts a worker, and make what belongs to this worker alone.

        Args:
            shared: the descriptors that all workers get
        """
        replies = self._make_ring(1, self._launch.limits.result_bytes)
        self.replies.append(self._processes.keep_open(RingReader(replies, 0)))
        stacks = self._processes.keep(os.memfd_create("tpllm-stacks", os.MFD_CLOEXEC))
        self._stack_fds.append(stacks)
        spec = {
            **shared,
            "stacks": stacks,
            "replies": replies.all(),
            "rank": self._ranks[local_rank],
            "world_size": self._launch.world_size,
            "local_rank": local_rank,
            "local_world_size": len(self._ranks),
            "device": local_rank,  # an engine takes the GPUs that this process sees, in order
            "directory": str(self._processes.directory),
            "settings": self._launch.settings,
        }
        inherited = (spec["lifeline"], spec["board"], stacks, *spec["plans"], *replies.all())
        return self._processes.command(self._launch.module, spec, inherited)

    def beats(self) -> int:
        return self._board.beats()

    def examine(self, phases: Sequence[str]) -> list[RankState]:
        pids = [worker.pid for worker in self.workers]
        return examine(self._ranks, pids, phases, self._board, self._stack_fds)


def start_local_host(launch: Launch, processes: ChildProcesses) -> list[LocalHost]:
    """Start all ranks of an engine on this host."""
    return [LocalHost(launch, range(launch.world_size), processes)]
