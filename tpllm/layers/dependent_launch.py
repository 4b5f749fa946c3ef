"""Launching a kernel while the one before it still runs.

A launch costs a GPU about a microsecond between two kernels, and at batch 1 a layer is a chain of
short ones. A kernel with a `PDL` parameter is put in place early, reads what its predecessor does
not write, and waits with `gdc_wait` until that one has written everything; after
`gdc_launch_dependents` the next one may come. Two rules keep that safe:

- Nothing that the predecessor writes is read, and nothing is written, before `gdc_wait`.
- Every such kernel lets dependents come after its own `gdc_wait` alone. So only the predecessor may
  still run: what lies two kernels back has ended.

It pays in a step of one row, all of whose kernels are ours. Behind a product of cuBLAS, which lets
nothing come before its end, an early launch takes 0.45 us longer than another.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch


def dependent_launch(device: torch.device, num_rows: int) -> dict[str, bool]:
    """Keywords of such a launch, for a step of one row: `PDL` for us, `launch_pdl` for Triton.

    With more rows, before compute capability 9.0, and in Triton's interpreter, kernels follow each
    other as ever.
    """
    if num_rows == 1 and _is_able(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _is_able(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
