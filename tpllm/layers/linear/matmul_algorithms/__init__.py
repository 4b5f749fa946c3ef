"""The fastest cuBLASLt algorithms of each kind of GPU, as measured: see `..matmul`."""

from pathlib import Path


def table_path(gpu: str) -> Path:
    """The table for GPUs of this name, whether there is one or not."""
    name = gpu.lower().replace(" ", "_")
    return Path(__file__).parent / f"{name}.json"
