"""The tokens that a model computes together, and what a block sees of them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tpllm.layers.attention.attention import AttentionBatch, KVCache
from tpllm.parallel.copy_streams import CopyStream

# The cache of each layer, by its index in the whole model.
KVCaches = Sequence[KVCache] | Mapping[int, KVCache]


@dataclass
class MicroBatch:
    """Tokens that go through the model together: a whole step, or one of its two micro-batches.

    Attributes:
        input_ids: [N] int32
        positions: [N] int32, each token's index in its sequence
        copy_stream: the copy stream that all-reduces this micro-batch; None for a whole step
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    copy_stream: CopyStream | None = None

    def computing(self) -> AbstractContextManager[None]:
        """Return the context in which a block is launched; the block ends in partial sums."""
        return nullcontext() if self.copy_stream is None else self.copy_stream.computing()


class BlockContext(NamedTuple):
    """What a block needs beside the hidden states of a micro-batch."""

    batch: MicroBatch
    kv_caches: KVCaches
