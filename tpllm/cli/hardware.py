"""Hardware: the GPUs of this machine and the links between them, from NVML."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from tpllm.config.devices import Gpu, installed, visible_gpus

# Values of nvmlGpuP2PCapsIndex_t: in the binding, the constant for the first is a tuple by mistake.
_P2P_READ, _P2P_NVLINK = 0, 2


@dataclass(frozen=True)
class Link:
    """Two GPUs, by their ranks, and their connection. None means that NVML does not report it.

    Attributes:
        nvlink: whether NVLink connects them
        peer_access: whether each can read the other's memory
    """

    ranks: tuple[int, int]
    nvlink: bool | None
    peer_access: bool | None


@dataclass(frozen=True)
class Hardware:
    """The driver, the visible GPUs and their links.

    Attributes:
        driver: the NVIDIA driver's version; None without one
        gpus: the visible ones; rank r takes the r-th
        num_nvlinks: NVLinks that are up, by GPU; None if NVML does not report them
        links: one for every pair of GPUs
        why_no_gpu: the reason if there is no GPU
    """

    driver: str | None
    gpus: list[Gpu]
    num_nvlinks: list[int | None]
    links: list[Link]
    why_no_gpu: str | None

    @classmethod
    def look(cls) -> "Hardware":
        """Query the driver. Without a driver or GPUs the lists are empty."""
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return cls(None, [], [], [], f"no NVIDIA driver answers ({error})")
        try:
            driver: str = pynvml.nvmlSystemGetDriverVersion()
            gpus = visible_gpus()
            handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus]
            num_nvlinks = [_num_nvlinks(pynvml, handle) for handle in handles]
            links = [_link(pynvml, pair, handles) for pair in combinations(range(len(gpus)), 2)]
            why = None if gpus else _why_none_is_visible(pynvml)
            return cls(driver, gpus, num_nvlinks, links, why)
        finally:
            pynvml.nvmlShutdown()

    def as_json(self) -> dict[str, Any]:
        """Return everything, for scripts."""
        gpus = [
            {
                "name": gpu.name,
                "uuid": gpu.uuid,
                "capability": gpu.capability,
                "memory_bytes": gpu.total_bytes,
                "free_bytes": gpu.free_bytes,
                "num_nvlinks": num_nvlinks,
            }
            for gpu, num_nvlinks in zip(self.gpus, self.num_nvlinks, strict=True)
        ]
        links = [asdict(link) for link in self.links]
        return {
            "driver": self.driver,
            "gpus": gpus,
            "links": links,
            "why_no_gpu": self.why_no_gpu,
        }


def _link(pynvml: Any, ranks: tuple[int, int], handles: list[Any]) -> Link:
    def status(capability: int) -> bool | None:
        a, b = (handles[rank] for rank in ranks)
        code = _query(pynvml, pynvml.nvmlDeviceGetP2PStatus, a, b, capability)
        return None if code is None else code == pynvml.NVML_P2P_STATUS_OK

    return Link(ranks, nvlink=status(_P2P_NVLINK), peer_access=status(_P2P_READ))


def _num_nvlinks(pynvml: Any, handle: Any) -> int | None:
    states = [
        _query(pynvml, pynvml.nvmlDeviceGetNvLinkState, handle, number)
        for number in range(pynvml.NVML_NVLINK_MAX_LINKS)
    ]
    known = [state for state in states if state is not None]
    return sum(state == pynvml.NVML_FEATURE_ENABLED for state in known) if known else None


def _query(pynvml: Any, call: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call of NVML; None if this GPU or driver does not support it."""
    try:
        return call(*args)
    except pynvml.NVMLError:
        return None


def _why_none_is_visible(pynvml: Any) -> str:
    if (count := pynvml.nvmlDeviceGetCount()) == 0:
        return "the driver knows of no GPU"
    build = installed("torch")
    if build is None:
        return "torch is not installed"
    if build.endswith("+cpu"):
        return f"torch {build} is a build without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES={visible!r} leaves none of {count}"
