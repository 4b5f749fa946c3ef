"""Running out of memory, told with figures and a mend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def explained_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn an allocation that fails inside into an error that says what to do about it.

    Raises:
        RuntimeError: memory ran out; the step's tokens are lost, so the engine has to end.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(_explain(device)) from error


def _explain(device: torch.device) -> str:
    mend = "lower gpu_memory_utilization or max_num_batched_tokens"
    if device.type != "cuda":
        return "the host ran out of memory in a step; lower num_kv_blocks or max_num_batched_tokens"
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    return (
        f"{device} ran out of memory in a step: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are "
        f"free, and this process holds {held / 2**30:.1f}; {mend}, or end whatever else uses it"
    )
