"""Upload of the integers of a step to the device, in one copy."""

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

_NUM_BUFFERS = 3  # uploads that can be in flight before the host waits
_ALIGN = 4  # words: every array is aligned to 16 bytes, for vectorised loads


class HostStaging:
    """Uploads int32 arrays through pinned buffers; each is reused when its copy is done.

    The device has one buffer at a fixed address, which a CUDA graph may read. By stream order, an
    upload waits for the kernels that read the one before it.

    Args:
        num_words: maximum int32 words of one upload, alignment included.

    Attributes:
        buffer: on the device, [num_words] int32
    """

    def __init__(self, num_words: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.buffer = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._buffers = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=on_cuda)
            for _ in range(_NUM_BUFFERS)
        ]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._done = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)] if on_cuda else []
        self._turn = 0

    def send(self, arrays: list[np.ndarray]) -> list[slice]:
        """Copy `arrays` to the device; return the slice of `buffer` that holds each."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        if self._done:
            self._done[turn].synchronize()
        host, offset, slices = self._arrays[turn], 0, []
        for array in arrays:
            where = slice(offset, offset + array.size)
            host[where] = array.reshape(-1)
            slices.append(where)
            offset = _aligned(where.stop)
        self.buffer[:offset].copy_(self._buffers[turn][:offset], non_blocking=True)
        if self._done:
            self._done[turn].record()
        return slices

    def views(self, sizes: list[int]) -> list[Tensor]:
        """Return the views of `buffer` that an upload of arrays of these sizes begins with."""
        offsets = accumulate(map(_aligned, sizes), initial=0)
        return [
            self.buffer[offset : offset + size]
            for offset, size in zip(offsets, sizes, strict=False)
        ]


def _aligned(num_words: int) -> int:
    """Round up to the offset at which the next array of an upload begins."""
    return -(-num_words // _ALIGN) * _ALIGN
