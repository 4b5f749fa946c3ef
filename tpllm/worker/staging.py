"""Carries the integers of a step from the host to the device, in one copy."""

import numpy as np
import torch
from torch import Tensor

_NUM_BUFFERS = 3  # uploads that can be on their way before the host waits
_ALIGN = 4  # words: every part starts at 16 bytes, for vectorised loads


class HostStaging:
    """Uploads int32 arrays through pinned buffers, each reused only once its copy is done.

    The device side is one buffer at a fixed address, which a CUDA graph may read: the next upload
    waits, by stream order, for the kernels that read the last one.

    Args:
        num_words: the most int32 words of one upload, alignment included.

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

    def upload(self, parts: list[np.ndarray]) -> list[Tensor]:
        """Copy `parts` to the device; returns them as flat views of the fixed buffer there."""
        return [self.buffer[where] for where in self.send(parts)]

    def send(self, parts: list[np.ndarray]) -> list[slice]:
        """Copy `parts` to the device; returns where each is in `buffer`."""
        turn = self._turn
        self._turn = (turn + 1) % len(self._buffers)
        if self._done:
            self._done[turn].synchronize()
        array, offset, places = self._arrays[turn], 0, []
        for part in parts:
            where = slice(offset, offset + part.size)
            array[where] = part.reshape(-1)
            places.append(where)
            offset = aligned(where.stop)
        self.buffer[:offset].copy_(self._buffers[turn][:offset], non_blocking=True)
        if self._done:
            self._done[turn].record()
        return places

    def views(self, sizes: list[int]) -> list[Tensor]:
        """Where an upload puts parts of these sizes if they come first, as a graph captures it."""
        views, offset = [], 0
        for size in sizes:
            views.append(self.buffer[offset : offset + size])
            offset = aligned(offset + size)
        return views


def aligned(num_words: int) -> int:
    """Where the next part of an upload begins."""
    return -(-num_words // _ALIGN) * _ALIGN
