"""What engines leave on a machine: counted before a trial and after it."""

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tpllm.config.devices import visible_gpus

GPU_SLACK_BYTES = 64 << 20  # other programs' comings and goings


@dataclass
class Traces:
    """What is there of ours now."""

    counts: dict[str, int]
    gpu_bytes: list[int]  # in use on each visible GPU, as NVML tells

    @staticmethod
    def now() -> "Traces":
        folder = tempfile.gettempdir()
        counts = {
            "directories": sum(name.startswith("tpllm-") for name in os.listdir(folder)),
            "processes": _count_processes(),
            "threads": threading.active_count(),
            "descriptors": _count_descriptors(),
            "shared memory": len(os.listdir("/dev/shm")),  # noqa: S108
        }
        return Traces(counts, used_gpu_bytes())

    def beyond(self, before: "Traces") -> list[str]:
        """What is here and was not before."""
        more = {k: self.counts[k] - before.counts[k] for k in self.counts}
        left = [f"{n} {what}" for what, n in more.items() if n > 0]
        for i, (now, then) in enumerate(zip(self.gpu_bytes, before.gpu_bytes, strict=True)):
            if now > then + GPU_SLACK_BYTES:
                left.append(f"{(now - then) >> 20} MiB on GPU {i}")
        return left


def used_gpu_bytes() -> list[int]:
    """Memory in use on each GPU that CUDA would offer here.

    Raises:
        RuntimeError: NVML does not tell, so that nobody could say that nothing is left.
    """
    used = []
    for i, gpu in enumerate(visible_gpus()):
        if gpu.total_bytes is None or gpu.free_bytes is None:
            raise RuntimeError(
                f"NVML does not tell how much memory of GPU {i} ({gpu.name}) is used"
            )
        used.append(gpu.total_bytes - gpu.free_bytes)
    return used


def _count_processes() -> int:
    """Processes that carry this run's mark in their environment, or are children of this one."""
    mark, me = f"CHAOS_RUN={os.environ['CHAOS_RUN']}".encode(), os.getpid()
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{name}/environ").read_bytes()
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        ours = mark in environment.split(b"\0") or int(fields[1]) == me
        count += ours and int(name) != me and fields[0] not in "ZX"
    return count


def _count_descriptors() -> int:
    """What this process has open, but for NVML's: the driver opens and keeps them as it likes."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += not os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/nvidia")
        except OSError:  # that of the listing itself
            continue
    return count
