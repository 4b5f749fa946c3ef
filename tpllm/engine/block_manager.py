"""Blocks of the KV cache: reference counts, prefix cache, least-recently-used reuse.

A block stores the keys and values of `block_size` consecutive tokens on every rank. A full block
whose tokens are known is registered under a digest of its tokens and all tokens before them. A
later sequence with the same prefix shares it (PagedAttention and its prefix caching,
https://arxiv.org/abs/2309.06180). A block without references keeps its content and its digest until
it is reused; the least recently released block is reused first.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import xxhash

from tpllm.channel.step_plan import RESERVED_BLOCK


class BlockManager:
    """Allocates the blocks after the reserved one, 1 to `num_blocks - 1`.

    Raises:
        ValueError: there are fewer than two blocks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_kv_blocks={num_blocks} leaves no block to use; give at least 2")
        self.block_size = block_size
        self.num_usable_blocks = num_blocks - 1
        self._caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # free blocks, least recently released first; a dict, since any of them may be taken out
        self._free = OrderedDict.fromkeys(range(RESERVED_BLOCK + 1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def digest_chain(self, tokens: Sequence[int], known: list[bytes]) -> list[bytes]:
        """Extend `known`, the digests of the first full blocks of `tokens`, to all full blocks.

        A digest is the 128-bit xxh3 hash of the previous digest and the block's tokens. Equal
        digests count as equal prefixes.
        """
        size = self.block_size
        if not self._caching:
            return known
        for i in range(len(known), len(tokens) // size):
            block = np.array(tokens[i * size : (i + 1) * size], dtype=np.int32).tobytes()
            known.append(xxhash.xxh3_128_digest((known[-1] if known else b"") + block))
        return known

    def match_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """Return the cached blocks of the longest known prefix, without taking them."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_take(self, cached: Sequence[int], num_new: int) -> bool:
        """Whether `take(cached, num_new)` would succeed."""
        revived = sum(self._ref_counts[block] == 0 for block in cached)
        return len(self._free) >= revived + num_new

    def take(self, cached: Sequence[int], num_new: int) -> list[int]:
        """Return a sequence's block table: the `cached` blocks, shared, and `num_new` new ones."""
        for block in cached:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        return [*cached, *(self.allocate() for _ in range(num_new))]

    def allocate(self) -> int:
        """Return the block that was released longest ago, and drop what it cached.

        Raises:
            KeyError: no block is free.
        """
        block, _ = self._free.popitem(last=False)
        digest = self._digests[block]
        if digest is not None:
            del self._block_of[digest]
            self._digests[block] = None
        self._ref_counts[block] = 1
        return block

    def register(self, block: int, digest: bytes) -> None:
        """Add a full block to the prefix cache, unless an equal block is already in it."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digests[block] = digest

    def release(self, table: Sequence[int]) -> None:
        """Release a sequence's blocks, so that its last blocks are reused before its first."""
        for block in reversed(table):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} released twice"
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:  # not in the prefix cache: reuse it first
                    self._free.move_to_end(block, last=False)

    def num_freed_by(self, table: Sequence[int]) -> int:
        """Return how many blocks `release(table)` would make free."""
        return sum(self._ref_counts[block] == 1 for block in table)

    def reset_prefix_cache(self) -> None:
        """Drop every cached prefix. Sequences keep the blocks that they use."""
        self._block_of.clear()
        self._digests = [None] * len(self._digests)
