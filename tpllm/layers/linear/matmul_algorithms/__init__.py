"""The fastest cuBLASLt algorithms for each kind of GPU, as measured: see `..matmul`."""

from pathlib import Path


def table_path(gpu: str) -> Path:
    """Return the path of the table for GPUs of this name, which may not exist."""
    name = gpu.lower().replace(" ", "_")
    return Path(__file__).parent / f"{name}.json"
