"""The GPUs that the workers will see, read from NVML, without torch or a CUDA context."""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one in multi-instance mode."""

    name: str
    uuid: str
    compute_capability: tuple[int, int]
    free_bytes: int | None = None  # None if NVML does not report it
    total_bytes: int | None = None

    def memory_text(self) -> str:
        """Return the free memory in words."""
        if self.free_bytes is None or self.total_bytes is None:
            return "memory unknown"
        return f"{self.free_bytes / 2**30:.1f} of {self.total_bytes / 2**30:.1f} GiB free"

    @property
    def capability(self) -> str:
        """The compute capability as a text: "9.0"."""
        return ".".join(map(str, self.compute_capability))


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA would offer, in order; none without a driver or a CUDA torch.

    CUDA_VISIBLE_DEVICES is read as CUDA reads it: indices, or prefixes of UUIDs; the first entry
    that names no GPU ends the list, so that "" and "-1" leave none.
    """
    if (installed("torch") or "+cpu").endswith("+cpu"):
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = [_describe(pynvml, handle) for handle in handles]
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        return gpus if wanted is None else _select(pynvml, gpus, wanted)
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe(pynvml: Any, handle: Any) -> Gpu:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=pynvml.nvmlDeviceGetName(handle),
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        compute_capability=(major, minor),
        **_memory(pynvml, handle),
    )


def _memory(pynvml: Any, handle: Any) -> dict[str, int]:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:  # not supported by every board
        return {}
    return {"free_bytes": int(memory.free), "total_bytes": int(memory.total)}


def _select(pynvml: Any, gpus: list[Gpu], wanted: str) -> list[Gpu]:
    selected: list[Gpu] = []
    for entry in wanted.split(","):
        gpu = _find(pynvml, gpus, entry.strip())
        if gpu is None or gpu in selected:  # CUDA offers nothing at all if one is named twice
            return [] if gpu else selected
        selected.append(gpu)
    return selected


def _find(pynvml: Any, gpus: list[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-"):
        return _find_slice(pynvml, entry)
    matches = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _find_slice(pynvml: Any, uuid: str) -> Gpu | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        whole = _describe(pynvml, pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
    except pynvml.NVMLError:
        return None
    return Gpu(whole.name, uuid, whole.compute_capability, **_memory(pynvml, handle))
