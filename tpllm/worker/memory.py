"""Errors of running out of memory, with figures and a mend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def explained_out_of_memory(device: torch.device, when: str) -> Iterator[None]:
    """Replace the error of a failed allocation by one that names the mend.

    Args:
        when: for the message, such as "in a step"

    Raises:
        RuntimeError: memory ran out; the step's results are lost, so the engine has to end.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(_explain(device, when)) from error


def _explain(device: torch.device, when: str) -> str:
    if device.type != "cuda":
        return f"the host ran out of memory {when}; lower num_kv_blocks or max_num_batched_tokens"
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    return (
        f"{device} ran out of memory {when}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are "
        f"free, and this process holds {held / 2**30:.1f}; lower gpu_memory_utilization or "
        "max_num_batched_tokens, or end other processes on this GPU"
    )
