"""What a model computes at once: a step, or one of its halves."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from tpllm.layers.attention.attention import AttentionBatch
from tpllm.parallel.copy_streams import CopyStream


@dataclass
class MicroBatch:
    """Tokens of a step that go through the model together: all of them, or one of two halves.

    Attributes:
        input_ids: [N] int32
        positions: [N] int32, each token's index in its sequence
        copy_stream: where a half runs; None for a step in one piece
    """

    input_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    copy_stream: CopyStream | None = None

    def computing(self) -> AbstractContextManager[None]:
        """Around the launch of a block, which ends in a term of a sum over the ranks."""
        return nullcontext() if self.copy_stream is None else self.copy_stream.computing()
