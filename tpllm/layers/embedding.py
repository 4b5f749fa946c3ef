"""Embedding and LM head, split over the TP group by vocabulary.

N tokens, S sequences, E hidden_size, V vocab_size, Vl = ceil(V / tp.size).

Rank r holds the rows of token ids [r * Vl, (r + 1) * Vl). If tp.size does not divide V, the last
ids do not exist: their rows are zero. No prompt contains them, and the sampler never samples them.

Source: Megatron-LM (2019), section 3, https://arxiv.org/abs/1909.08053
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tpllm.layers.context import LayerContext
from tpllm.layers.weights import WeightSource, fill


class _VocabParallel(nn.Module):
    """A band of vocabulary rows: weight [Vl, E]."""

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        super().__init__()
        tp = self.tp = context.tp
        self.matmul = context.matmul
        self.vocab_size = vocab_size
        self.local_vocab_size = -(-vocab_size // tp.size)
        self.vocab_start = tp.rank * self.local_vocab_size
        self.weight = context.parameter(self.local_vocab_size, hidden_size)

    def load(self, weights: WeightSource, name: str) -> None:
        """Read this rank's rows. With a small vocabulary, the last ranks may hold only padding."""
        start = min(self.vocab_start, self.vocab_size)
        stop = min(self.vocab_start + self.local_vocab_size, self.vocab_size)
        if start < stop:
            rows = weights.read(f"{name}.weight", rows=slice(start, stop))
            fill(self.weight[: stop - start], rows, f"{name}.weight")
        self.weight[stop - start :].zero_()


class VocabParallelEmbedding(_VocabParallel):
    """Token embedding: each rank looks up the ids that it holds; the other ids give zeros.

    Shapes:
        input [N] int32, equal on every rank, 0 <= id < V
        output [N, E], this rank's partial sums, the input of an `AllReduceRMSNorm`
        weight [Vl, E], this rank's shard
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        ids = input_ids - self.vocab_start
        local_ids = ids.clamp(0, self.local_vocab_size - 1)
        x = F.embedding(local_ids, self.weight)  # [N, E]
        return x.masked_fill_((ids != local_ids).unsqueeze(-1), 0)


class ParallelLMHead(_VocabParallel):
    """Computes this rank's slice of the logits. The slices are never gathered: see the sampler.

    Column j of the output is the logit of token id `vocab_start + j`; ids from V on are padding.

    Shapes:
        input [S, E], equal on every rank
        output [S, Vl], this rank's slice; `out` if it is given
        weight [Vl, E], this rank's shard
    """

    def forward(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.matmul(hidden, self.weight, out)

    def tie_to(self, embedding: VocabParallelEmbedding) -> None:
        """Share the embedding's weight (`tie_word_embeddings`); only the embedding is loaded."""
        assert embedding.weight.shape == self.weight.shape
        self.weight = embedding.weight
