"""Programmatic dependent launch: a kernel is launched while the one before it still runs.

A launch costs about a microsecond between two kernels, and at batch 1 a layer is a chain of short
kernels. A kernel with a `PDL` parameter is launched early, reads only what its predecessor does not
write, and then calls `gdc_wait`, which returns when the predecessor has written everything. After
`gdc_launch_dependents` the next kernel may be launched. Two rules keep this safe:

- Before `gdc_wait`, a kernel reads nothing that its predecessor writes, and writes nothing.
- A kernel calls `gdc_launch_dependents` only after its own `gdc_wait`. So only the direct
  predecessor may still run; the kernel before it has ended.

It pays in a step of one row, in which all kernels are ours. After a cuBLAS matmul, which launches
no dependents before its end, an early launch takes 0.45 us longer than a normal one.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch


def dependent_launch(device: torch.device, num_rows: int) -> dict[str, bool]:
    """Return the keywords of a launch: our `PDL`, and `launch_pdl` of Triton.

    Only a step of one row is launched early, and only on compute capability 9.0 or later; Triton's
    interpreter never launches early.
    """
    if num_rows == 1 and _supports_dependent_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _supports_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
