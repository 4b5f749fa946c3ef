"""Hardware: the GPUs here and the links between them, asked of NVML, without a CUDA context."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Any

from tpllm.config.devices import Gpu, visible_gpus

# nvmlGpuP2PCapsIndex_t, as NVML counts: the binding's own name of the first is a tuple by a slip.
_P2P_READ, _P2P_NVLINK = 0, 2


@dataclass(frozen=True)
class GpuFacts:
    """A GPU as the workers will see it; rank r takes the r-th.

    Attributes:
        memory_bytes, free_bytes: of the device, and what nobody holds now; None where NVML does
            not tell, as where GPU and CPU share theirs
        num_nvlinks: NVLinks that are up; None where NVML does not tell
    """

    name: str
    uuid: str
    capability: str
    memory_bytes: int | None
    free_bytes: int | None
    num_nvlinks: int | None


@dataclass(frozen=True)
class Link:
    """Two GPUs, by their ranks, and how they reach each other. None: NVML does not tell.

    Attributes:
        nvlink: whether over NVLink
        peer_access: whether each can read the other's memory
    """

    ranks: tuple[int, int]
    nvlink: bool | None
    peer_access: bool | None


@dataclass(frozen=True)
class Hardware:
    """What there is.

    Attributes:
        driver: the NVIDIA driver's version; None without one
        gpus: the visible ones, in order
        links: of every pair of them
        why_no_gpu: where there are none
    """

    driver: str | None
    gpus: list[GpuFacts]
    links: list[Link]
    why_no_gpu: str | None

    @classmethod
    def look(cls) -> "Hardware":
        """Ask the driver. Without one, or without GPUs, the lists are empty."""
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return cls(None, [], [], f"no NVIDIA driver answers ({error})")
        try:
            driver: str = pynvml.nvmlSystemGetDriverVersion()
            visible = visible_gpus()
            handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in visible]
            gpus = [
                _facts(pynvml, gpu, handle) for gpu, handle in zip(visible, handles, strict=True)
            ]
            links = [_link(pynvml, pair, handles) for pair in combinations(range(len(gpus)), 2)]
            return cls(driver, gpus, links, None if gpus else _why_none_is_visible(pynvml))
        finally:
            pynvml.nvmlShutdown()


def _facts(pynvml: Any, gpu: Gpu, handle: Any) -> GpuFacts:
    memory = _ask(pynvml, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    return GpuFacts(
        name=gpu.name,
        uuid=gpu.uuid,
        capability=gpu.capability,
        memory_bytes=None if memory is None else memory.total,
        free_bytes=None if memory is None else memory.free,
        num_nvlinks=_num_nvlinks(pynvml, handle),
    )


def _link(pynvml: Any, ranks: tuple[int, int], handles: list[Any]) -> Link:
    def status(capability: int) -> bool | None:
        a, b = (handles[rank] for rank in ranks)
        told = _ask(pynvml, lambda: pynvml.nvmlDeviceGetP2PStatus(a, b, capability))
        return None if told is None else told == pynvml.NVML_P2P_STATUS_OK

    return Link(
        ranks,
        nvlink=status(_P2P_NVLINK),
        peer_access=status(_P2P_READ),
    )


def _num_nvlinks(pynvml: Any, handle: Any) -> int | None:
    states = [
        _ask(pynvml, partial(pynvml.nvmlDeviceGetNvLinkState, handle, number))
        for number in range(pynvml.NVML_NVLINK_MAX_LINKS)
    ]
    told = [state for state in states if state is not None]
    return sum(state == pynvml.NVML_FEATURE_ENABLED for state in told) if told else None


def _ask(pynvml: Any, question: Callable[[], Any]) -> Any:
    """NVML's answer; None where this GPU or driver has none to give."""
    try:
        return question()
    except pynvml.NVMLError:
        return None


def _why_none_is_visible(pynvml: Any) -> str:
    if (count := pynvml.nvmlDeviceGetCount()) == 0:
        return "the driver knows of no GPU"
    try:
        build = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if build.endswith("+cpu"):
        return f"torch {build} is a build without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES={visible!r} leaves none of {count}"
