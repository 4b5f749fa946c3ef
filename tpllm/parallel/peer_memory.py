"""Memory of every rank that every other rank can read directly, over NVLink.

A rank writes its partial sums into a slot of its own memory; a kernel then reads the same slot of
all ranks and adds them up, without a ring of copies in between. Kernels of different GPUs meet by
signals: rank p's program b raises `signals[p, b]` in every rank's memory and waits until all ranks
have raised theirs in its own.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

# A step uses the slots in turn, so that a rank that runs ahead never overwrites what a slower one
# still reads: the signals of the sums in between have told it that the slower one is done.
NUM_SLOTS = 3
# Programs of one kernel that can meet their likes: at most one on each multiprocessor, so that all
# of them run at the same time and none waits for one that has not started.
MAX_PROGRAMS = 128


class PeerMemory:
    """Slots for partial sums [max_rows, width], and signals, on every rank of a group.

    Every rank makes one, with the same arguments, at the same time.

    Attributes:
        base_ptrs: device address of an array with each rank's base address, in rank order
        signal_ptrs: likewise of each rank's signals, [size, MAX_PROGRAMS] int32
        epochs: [MAX_PROGRAMS] int32, how often each program of this rank has met its likes

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        max_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_rows = max_rows
        self.width = width
        self.dtype = dtype
        self.slot_elements = max_rows * width
        self._sums = symmetric_memory.empty(
            NUM_SLOTS * self.slot_elements, dtype=dtype, device=device
        )
        self._signals = symmetric_memory.empty(
            group.size() * MAX_PROGRAMS, dtype=torch.int32, device=device
        )
        self._signals.zero_()
        self.epochs = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
        # the handles own the mappings of the peers' memory
        self._sums_handle = symmetric_memory.rendezvous(self._sums, group)
        self._signals_handle = symmetric_memory.rendezvous(self._signals, group)
        self.base_ptrs: int = self._sums_handle.buffer_ptrs_dev
        self.signal_ptrs: int = self._signals_handle.buffer_ptrs_dev
        torch.cuda.synchronize()
        dist.barrier(group)  # nobody signals before all signals are zero

    def slot(self, index: int, num_rows: int) -> Tensor | None:
        """Where this rank leaves its partial sums [num_rows, width]; None if they do not fit."""
        if num_rows > self.max_rows:
            return None
        first = index * self.slot_elements
        return self._sums[first : first + num_rows * self.width].view(num_rows, self.width)

    def offset_of(self, x: Tensor) -> int | None:
        """Elements between the base and x; None if x is not in a slot."""
        offset = (x.data_ptr() - self._sums.data_ptr()) // self.dtype.itemsize
        return offset if 0 <= offset < self._sums.numel() else None
