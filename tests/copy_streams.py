"""Copy streams for CPU processes: Gloo exchanges, with all work in the order of its launch."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from tpllm.parallel.collectives import all_gather, all_to_all
from tpllm.parallel.copy_streams import NUM_COPY_STREAMS, share_of
from tpllm.parallel.group import TPGroup


class GlooCopyStream:
    """Exchanges over Gloo, counts the rows that it reduced, and reuses one output buffer."""

    def __init__(self, tp: TPGroup, max_rows: int, width: int) -> None:
        self._tp = tp
        self._outputs = torch.full((max_rows, width), torch.nan)
        self.num_rows = 0

    def computing(self) -> nullcontext[None]:
        return nullcontext()

    def exchanging(self) -> nullcontext[None]:
        return nullcontext()

    def share(self, num_rows: int) -> slice:
        return share_of(num_rows, self._tp.rank, self._tp.size)

    def exchange_partial_sums(self, x: Tensor) -> Tensor:
        self.num_rows += len(x)
        max_share = -(-len(x) // self._tp.size)
        partial_sums = x.new_full((self._tp.size, max_share, x.shape[1]), torch.nan)
        for peer, theirs in enumerate(partial_sums):
            partial_sum = x[share_of(len(x), peer, self._tp.size)]
            theirs[: len(partial_sum)] = partial_sum
        found = all_to_all(partial_sums, self._tp)
        found[self._tp.rank] = torch.nan  # a rank must not read its own entry
        return found

    def outputs(self, num_rows: int) -> Tensor:
        return self._outputs[:num_rows]

    def exchange_outputs(self, num_rows: int) -> None:
        max_share = -(-num_rows // self._tp.size)
        ours = self._outputs.new_full((max_share, self._outputs.shape[1]), torch.nan)
        share = self._outputs[self.share(num_rows)]
        ours[: len(share)] = share
        for peer, theirs in enumerate(all_gather(ours, self._tp)):
            rows = share_of(num_rows, peer, self._tp.size)
            self._outputs[rows] = theirs[: rows.stop - rows.start]


def with_gloo_copy_streams(tp: TPGroup, max_rows: int, width: int) -> TPGroup:
    return replace(
        tp, copy_streams=tuple(GlooCopyStream(tp, max_rows, width) for _ in range(NUM_COPY_STREAMS))
    )
