"""What engines leave on a machine, counted before and after a trial."""

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tpllm.config.devices import visible_gpus

GPU_SLACK_BYTES = 64 << 20  # for other programs that start or end meanwhile


@dataclass
class Traces:
    """Counts of this run's processes, files and descriptors, and GPU memory in use."""

    counts: dict[str, int]
    gpu_bytes: list[int]  # in use on each visible GPU, from NVML

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
        """Return what exists now and did not exist `before`."""
        more = {k: self.counts[k] - before.counts[k] for k in self.counts}
        left = [f"{n} {name}" for name, n in more.items() if n > 0]
        for i, (now, then) in enumerate(zip(self.gpu_bytes, before.gpu_bytes, strict=True)):
            if now > then + GPU_SLACK_BYTES:
                left.append(f"{(now - then) >> 20} MiB on GPU {i}")
        return left


def used_gpu_bytes() -> list[int]:
    """Return the memory in use on each GPU that CUDA would offer here.

    Raises:
        RuntimeError: NVML does not report it, so a leak could not be found.
    """
    used = []
    for i, gpu in enumerate(visible_gpus()):
        if gpu.total_bytes is None or gpu.free_bytes is None:
            raise RuntimeError(f"NVML does not report the used memory of GPU {i} ({gpu.name})")
        used.append(gpu.total_bytes - gpu.free_bytes)
    return used


def _count_processes() -> int:
    """Count processes with this run's mark in their environment, and children of this process."""
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
    """Count this process's open descriptors, except those of NVML, which the driver keeps."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += not os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/nvidia")
        except OSError:  # the descriptor of the listing itself
            continue
    return count
