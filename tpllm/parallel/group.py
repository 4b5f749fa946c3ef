"""A group of ranks as one of them sees it: its rank, the size, and the connections."""

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

    `tp.size == 1` runs the same code: it has no process group, and every collective is the
    identity.

    Attributes:
        rank: this process's index in the group, 0 <= rank < size
        size: number of ranks, one process and one device each
        device: where this rank's weights and activations live
        process_group: the torch.distributed group, or None where `size` is 1
        peers: peer buffers for all-reduces, in memory that all ranks can write; None if NCCL or
            Gloo does every all-reduce
        copy_streams: one for each micro-batch of a large step; empty if no step is split into
            micro-batches
        role: what the group divides: "tp" for the tensors of a layer
        one_host: whether all ranks run on one host, so that they may reach each other's memory
    """

    rank: int
    size: int
    device: torch.device
    process_group: dist.ProcessGroup | None
    peers: PeerBuffers | None = None
    copy_streams: tuple[CopyStream, ...] = ()
    role: str = "tp"
    one_host: bool = True

    @staticmethod
    def single(device: torch.device) -> "TPGroup":
        """Return the group of one rank, with the whole model on `device`."""
        return TPGroup(rank=0, size=1, device=device, process_group=None)

    @staticmethod
    def connect(
        rank: int,
        size: int,
        device: torch.device,
        store_path: str,
        timeout_s: float,
        *,
        one_host: bool = True,
    ) -> "TPGroup":
        """Connect the ranks through the file `store_path`, over NCCL (CUDA) or Gloo (CPU).

        Every rank calls this with the same `size` and `store_path`; it returns when all ranks have
        called it. The group becomes the default group of torch.distributed, so a process can join
        only one. With `size` 1, torch.distributed is not used.

        Args:
            store_path: a file that does not exist yet, in a directory that every rank can write
            timeout_s: longest wait for the other ranks, here and in every later collective
            one_host: whether all ranks run on one host; every rank says the same

        Raises:
            torch.distributed.DistError: a rank did not connect within `timeout_s`.
        """
        assert 0 <= rank < size, f"rank {rank} is outside a group of {size}"
        if size == 1:
            return TPGroup.single(device)
        if one_host:
            # On the loopback interface no other machine can reach the ranks' sockets, and a host
            # without a network or without a resolvable name works too.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # All our collectives run on one stream, captured or not, so NCCL need not order those of a
        # graph against the others. The ordering costs each eager all-reduce 0.4 ms on the host.
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
        # The coordinator detects hangs and kills the ranks at once. torch's own monitor would end a
        # rank by SIGABRT when its watchdog is delayed, and would wait for dumps that are not used.
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            backend="nccl" if on_cuda else "gloo",
            store=dist.FileStore(store_path, size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            # With a device id, NCCL connects now instead of in the first collective, which may run
            # under CUDA graph capture.
            device_id=device if on_cuda else None,
        )
        return TPGroup(rank, size, device, dist.group.WORLD, one_host=one_host)

    def close(self) -> None:
        """Leave the group and free its sockets, threads and device buffers.

        No collective may be called afterwards.
        """
        if self.process_group is not None:
            dist.destroy_process_group(self.process_group)
