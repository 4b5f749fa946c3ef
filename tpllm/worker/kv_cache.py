"""The paged KV cache of one rank: its shape and its memory."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from tpllm.errors import SettingError
from tpllm.layers.attention.attention import KVCache


@dataclass(frozen=True)
class CacheShape:
    """The shape of one rank's cache; a block holds `block_size` tokens in every layer."""

    num_layers: int
    block_size: int
    num_kv_heads: int  # this rank's
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block, keys and values."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * self.dtype.itemsize

    def allocate(self, num_blocks: int, device: torch.device) -> list[KVCache]:
        """Allocate keys and values of every layer, each [num_blocks, block_size, K, D], zeroed.

        Kernels multiply values beyond a sequence's end by a weight of zero. Fresh memory may hold
        NaN, and zero times NaN is NaN, so the cache has to be zeroed.

        Raises:
            SettingError: the device does not have enough memory.
        """
        try:
            return self._allocate(num_blocks, device)
        except (MemoryError, torch.OutOfMemoryError):
            gigabytes = num_blocks * self.block_bytes / 2**30
            raise SettingError(
                f"num_kv_blocks={num_blocks} takes {gigabytes:.1f} GiB, more than {device} has "
                "free; lower num_kv_blocks"
            ) from None

    def _allocate(self, num_blocks: int, device: torch.device) -> list[KVCache]:
        shape = (self.num_layers, 2, num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        if device.type == "cpu":
            # numpy lets the operating system zero each page on first use; torch.zeros writes all
            # pages at once: 9 s for 4 GiB
            num_bytes = math.prod(shape) * self.dtype.itemsize
            memory = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
            cache = memory.view(self.dtype).view(shape)
        else:
            cache = torch.zeros(shape, dtype=self.dtype, device=device)
        return [(layer[0], layer[1]) for layer in cache]
