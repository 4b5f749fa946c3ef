"""Pages of the KV cache: reference counts, prefix cache, least-recently-used reuse.

A block stores the keys and values of `block_size` consecutive tokens on every rank. A full block
whose tokens are known is registered under a digest of its tokens and everything before them, so
that a later sequence with the same beginning shares it (PagedAttention and its prefix caching,
https://arxiv.org/abs/2309.06180). A block that nobody holds keeps its content and its digest until
its turn comes to be reused, the least recently released first.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import xxhash

from tpllm.channel.step_plan import RESERVED_BLOCK


class BlockManager:
    """Hands out the blocks after the reserved one, 1 to `num_blocks - 1`.

    Raises:
        ValueError: fewer than two blocks, so that none is left to hand out.
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
        # free blocks, least recently released first; a dict to take one out of the middle
        self._free = OrderedDict.fromkeys(range(RESERVED_BLOCK + 1, num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def digest_chain(self, tokens: Sequence[int], known: list[bytes]) -> list[bytes]:
        """Extend `known`, the digests of the first full blocks of `tokens`, to all full blocks.

        128 bits of xxh3 over (previous digest, the block's tokens): equal digests are taken as
        equal prefixes.
        """
        size = self.block_size
        if not self._caching:
            return known
        for i in range(len(known), len(tokens) // size):
            block = np.array(tokens[i * size : (i + 1) * size], dtype=np.int32).tobytes()
            known.append(xxhash.xxh3_128_digest((known[-1] if known else b"") + block))
        return known

    def match_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix, not yet taken."""
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
        """Share the `cached` blocks and add `num_new` fresh ones: the table of a sequence."""
        for block in cached:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        return [*cached, *(self.allocate() for _ in range(num_new))]

    def allocate(self) -> int:
        """One fresh block, the one released longest ago; what it cached is forgotten.

        Raises:
            KeyError: none is free.
        """
        block, _ = self._free.popitem(last=False)
        digest = self._digests[block]
        if digest is not None:
            del self._block_of[digest]
            self._digests[block] = None
        self._ref_counts[block] = 1
        return block

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block findable. Of two equal blocks the first stays the one that is found."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digests[block] = digest

    def release(self, table: Sequence[int]) -> None:
        """Give a sequence's blocks back, its last ones to be reused before its first."""
        for block in reversed(table):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} released twice"
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:  # caches nothing: the first to be reused
                    self._free.move_to_end(block, last=False)

    def num_freed_by(self, table: Sequence[int]) -> int:
        """How many blocks `release(table)` would make free."""
        return sum(self._ref_counts[block] == 1 for block in table)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; blocks in use stay with their sequences."""
        self._block_of.clear()
        self._digests = [None] * len(self._digests)
