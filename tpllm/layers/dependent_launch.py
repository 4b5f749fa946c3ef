"""Launching a kernel while the one before it still runs.

A launch costs a GPU about a microsecond between two kernels, and at batch 1 a layer is a chain of
short ones. A kernel with a `PDL` parameter is put in place early, reads what no kernel of this step
writes, and waits with `gdc_wait` until its predecessor has written everything; after
`gdc_launch_dependents` the next one may come. Two rules keep that safe:

- Nothing that a kernel of the same step writes is read, and nothing is written, before `gdc_wait`.
- Every such kernel calls `gdc_wait`, so that the end of one is the end of all before it.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Keywords of such a launch: `PDL` for the kernel, `launch_pdl` for Triton, on GPUs that can.

    Before compute capability 9.0, and in Triton's interpreter, kernels follow each other as ever.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
