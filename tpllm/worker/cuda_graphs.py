"""Steps as CUDA graphs: one launch for hundreds.

A step of decode rows alone is one graph, collectives and sampling included. A mixed step of few
tokens is a graph up to its hidden states: launched one by one, its kernels take the host longer
than the GPU, 17 to 29 ms a step, and everybody who decodes waits. Larger mixed steps keep the GPU
busy for longer than that.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Prompt chunks in the graph of a mixed step; what a step has fewer costs attention next to nothing.
MAX_CHUNKS = 16
_MIXED_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024)
# The shape of attention's programs is that for as many decode rows as there may be.
_MIXED_DECODE_ROWS = (16, 64)


@dataclass(frozen=True, order=True)
class MixedSize:
    """A graph's size: tokens of the step, and how many of them may be decode rows."""

    num_tokens: int
    num_decode: int


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: every batch runs padded to the next of them.

    Small batches, where a padded row costs most, have sizes close together; beyond 32 a step of 16
    pads by 3 % on average at 256.
    """
    sizes = {1, 2, 4, *range(8, 33, 8), *range(48, 257, 16), *range(288, max_num_seqs, 32)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def padded_size(sizes: list[int], batch_size: int) -> int:
    """The smallest of the sorted `sizes` that holds the batch."""
    return sizes[bisect.bisect_left(sizes, batch_size)]


def mixed_sizes(max_num_batched_tokens: int, max_num_seqs: int) -> list[MixedSize]:
    """Sizes of mixed steps that get a graph."""
    rows = {min(size, max_num_seqs) for size in (*_MIXED_DECODE_ROWS, max_num_seqs)}
    return sorted(
        {
            MixedSize(num_tokens, min(num_tokens, num_decode))
            for num_tokens in _MIXED_TOKENS
            if num_tokens <= max_num_batched_tokens
            for num_decode in rows
        }
    )


def padded_mixed_size(
    sizes: list[MixedSize], num_tokens: int, num_decode: int, num_chunks: int
) -> MixedSize | None:
    """The smallest of the sorted `sizes` that holds the step; None if none does."""
    if not 0 < num_chunks <= MAX_CHUNKS:
        return None
    for size in sizes[bisect.bisect_left(sizes, MixedSize(num_tokens, 0)) :]:
        if size.num_decode >= num_decode:
            return size
    return None


@dataclass
class CapturedStep:
    """A step of one size: replay it, and `result` holds what it computes."""

    graph: torch.cuda.CUDAGraph
    result: Tensor


class GraphPool:
    """Captures steps, the largest first.

    All graphs share one memory pool: they never run at the same time, and the largest, captured
    first, has already reserved what the others need.
    """

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle

    def capture(self, run: Callable[[], Tensor]) -> CapturedStep:
        """Capture a step that reads and writes fixed buffers alone.

        It runs once before: that compiles kernels and lets libraries allocate, outside capture.
        """
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread may query events while this thread captures
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        self._pool = self._pool or graph.pool()
        return CapturedStep(graph, result)
