"""The fastest algorithms of cuBLASLt by kind of GPU, as measured; see `tpllm.layers.matmul`."""

from pathlib import Path


def table_path(gpu: str) -> Path:
    """The table for GPUs of this name, whether there is one or not."""
    name = gpu.lower().replace(" ", "_")
    return Path(__file__).parent / f"{name}.json"
