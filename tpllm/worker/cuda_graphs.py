"""Steps as CUDA graphs: one launch instead of hundreds.

A pure decode step is one graph, including collectives and sampling. A small mixed step is a graph
up to its hidden states: launching its kernels one by one takes the host 17 to 29 ms, longer than
the GPU computes, and delays all decode rows. Larger mixed steps keep the GPU busy for longer than
that.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Prefill chunks in the graph of a mixed step; padding chunks cost attention almost nothing.
MAX_CHUNKS = 16
_MIXED_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024)
# Attention's programs are shaped for the graph's number of decode rows.
_MIXED_DECODE_ROWS = (16, 64)


@dataclass(frozen=True, order=True)
class MixedSize:
    """A graph's size: the tokens of the step, and the decode rows among them at most."""

    num_tokens: int
    num_decode: int


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes that get a graph; every batch is padded to the next size.

    Small sizes are close together, because a padded row costs most there. Beyond 32, steps of 16
    pad a batch of 256 by 3 % on average.
    """
    sizes = {1, 2, 4, *range(8, 33, 8), *range(48, 257, 16), *range(288, max_num_seqs, 32)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def padded_size(sizes: list[int], batch_size: int) -> int:
    """Return the smallest of the sorted `sizes` that holds the batch."""
    return sizes[bisect.bisect_left(sizes, batch_size)]


def mixed_sizes(max_num_batched_tokens: int, max_num_seqs: int) -> list[MixedSize]:
    """Return the sizes of mixed steps that get a graph."""
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
    """Return the smallest of the sorted `sizes` that holds the step; None if none does."""
    if not 0 < num_chunks <= MAX_CHUNKS:
        return None
    for size in sizes[bisect.bisect_left(sizes, MixedSize(num_tokens, 0)) :]:
        if size.num_decode >= num_decode:
            return size
    return None


@dataclass
class CapturedStep:
    """A captured step of one size; after a replay `result` holds its output."""

    graph: torch.cuda.CUDAGraph
    result: Tensor


class GraphPool:
    """Captures steps, the largest first.

    All graphs share one memory pool, because they never run at the same time. The largest graph is
    captured first and reserves the memory that the others need.
    """

    def __init__(self) -> None:
        self._pool: Any = None  # torch's handle

    def capture(self, run: Callable[[], Tensor]) -> CapturedStep:
        """Capture a step that reads and writes only fixed buffers.

        The step runs once before the capture, so that kernels compile and libraries allocate.
        """
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread may query events while this thread captures
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        self._pool = self._pool or graph.pool()
        return CapturedStep(graph, result)
