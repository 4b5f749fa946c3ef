"""Steps as CUDA graphs: one launch instead of hundreds.

A decode step is two graphs: the forward up to its logits, collectives included, and sampling. A
small mixed step is a graph up to its hidden states: launching its kernels one by one takes the host
17 to 29 ms, longer than the GPU computes, and delays all decode rows. Larger mixed steps keep the
GPU busy for longer than that.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Prefill chunks in the graph of a mixed step; padding chunks cost attention almost nothing.
MAX_CHUNKS = 16
_MIXED_TOKENS = (64, 128, 192, 256, 384, 512, 640, 768, 1024)
# Attention's programs are shaped for the graph's number of decode rows.
_MIXED_DECODE_ROWS = (16, 64)


class StepSize(NamedTuple):
    """The size to which a step is padded: its tokens, and the most decode rows and chunks."""

    num_tokens: int
    num_decode: int
    num_chunks: int


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes that get a graph; every batch is padded to the next size.

    Small sizes are close together, because a padded row costs most there. Beyond 32, steps of 16
    pad a batch of 256 by 3 % on average.
    """
    sizes = {1, 2, 4, *range(8, 33, 8), *range(48, 257, 16), *range(288, max_num_seqs, 32)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def mixed_sizes(max_num_batched_tokens: int, max_num_seqs: int) -> list[StepSize]:
    """Return the sizes of mixed steps that get a graph."""
    rows = {min(size, max_num_seqs) for size in (*_MIXED_DECODE_ROWS, max_num_seqs)}
    return sorted(
        {
            StepSize(num_tokens, min(num_tokens, num_decode), MAX_CHUNKS)
            for num_tokens in _MIXED_TOKENS
            if num_tokens <= max_num_batched_tokens
            for num_decode in rows
        }
    )


def padded_size(sizes: list[StepSize], step: StepSize) -> StepSize | None:
    """Return the smallest of the sorted `sizes` that holds the step; None if none does."""
    for size in sizes[bisect.bisect_left(sizes, (step.num_tokens,)) :]:
        if size.num_decode >= step.num_decode and size.num_chunks >= step.num_chunks:
            return size
    return None


@dataclass
class CapturedStep:
    """A captured step, or a part of one, of one size."""

    graph: torch.cuda.CUDAGraph
    result: Tensor

    def replay(self) -> Tensor:
        """Compute again; return the result, which the next replay overwrites."""
        self.graph.replay()
        return self.result


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
