"""The tensor-parallel (TP) group as one rank sees it: who am I, how many are we, how do we talk."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.peer_memory import PeerBuffers


@dataclass(frozen=True)
class TPGroup:
    """One rank's membership in a tensor-parallel group; layers take it as the argument `tp`.

    `tp.size == 1` is the plain case of the same code: it has no process group, and no collective
    does anything.

    Attributes:
        rank: this process's index in the group, 0 <= rank < size
        size: number of ranks, one process and one device each
        device: where this rank's weights and activations live
        process_group: the torch.distributed group, or None where `size` is 1
        peers: peer buffers in memory that all ranks can write, for sums; None where NCCL or
            Gloo does everything
        copy_streams: in which the halves of a large step run beside each other; none where they do not
    """

    rank: int
    size: int
    device: torch.device
    process_group: dist.ProcessGroup | None
    peers: PeerBuffers | None = None
    copy_streams: tuple[CopyStream, ...] = ()

    @staticmethod
    def single(device: torch.device) -> "TPGroup":
        """The group of one rank: the whole model on `device`."""
        return TPGroup(rank=0, size=1, device=device, process_group=None)

    @staticmethod
    def connect(
        rank: int, size: int, device: torch.device, store_path: str, timeout_s: float
    ) -> "TPGroup":
        """Meet the other ranks at the file `store_path` and open NCCL (CUDA) or Gloo (CPU).

        Every rank calls this with the same `size` and `store_path`; it returns when all have come.
        The group becomes the default one of torch.distributed, so a process joins one group in its
        life. A size of 1 never touches torch.distributed.

        Args:
            store_path: a file that does not exist yet, in a directory that every rank can write
            timeout_s: longest wait for the other ranks, here and in every later collective

        Raises:
            torch.distributed.DistError: a rank did not come within `timeout_s`.
        """
        assert 0 <= rank < size, f"rank {rank} is outside a group of {size}"
        if size == 1:
            return TPGroup.single(device)
        # All ranks share a host: over the loopback no other machine can reach their sockets, and
        # a host without a network, or whose name resolves to nothing, works too.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # All our collectives run on one stream, captured or not, so NCCL need not order a graph's
        # against the others: that costs every eager all-reduce 0.4 ms on the host.
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
        # The coordinator watches for hangs, and kills at once. torch's own monitor would end a rank
        # by SIGABRT when its watchdog is held up, and wait for dumps that nobody reads.
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            backend="nccl" if on_cuda else "gloo",
            store=dist.FileStore(store_path, size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            # With the device known NCCL connects now, not inside the first collective, which may
            # be under CUDA graph capture.
            device_id=device if on_cuda else None,
        )
        return TPGroup(rank=rank, size=size, device=device, process_group=dist.group.WORLD)

    def close(self) -> None:
        """Leave the group: free its sockets, threads and device buffers. No collective after it."""
        if self.process_group is not None:
            dist.destroy_process_group(self.process_group)
