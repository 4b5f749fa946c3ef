"""Embedding and LM head, split over the TP group by vocabulary.

N tokens, S sequences, E hidden_size, V vocab_size, Vl = ceil(V / tp.size).

Rank r holds the rows of token ids [r * Vl, (r + 1) * Vl). If tp.size does not divide V, the last
ids do not exist: their rows are zero. No prompt contains them, and the sampler never samples them.

Source: Megatron-LM (2019), section 3, https://arxiv.org/abs/1909.08053
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tpllm.architectures.spec import LinearSpec, WeightSpec
from tpllm.layers.context import LayerContext
from tpllm.layers.weights import Layer, WeightSource, fill


class _VocabParallel(Layer):
    """A band of vocabulary rows: weight [Vl, E]."""

    def __init__(
        self, spec: WeightSpec, context: LayerContext, weight: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.spec, self.tp = spec, context.tp
        shape = spec.local_shape(self.tp.size)
        self.local_vocab_size = shape[0]
        self.vocab_start = self.tp.rank * self.local_vocab_size
        self.weight = context.parameter(*shape) if weight is None else weight

    def load(self, weights: WeightSource) -> None:
        """Read this rank's rows. With a small vocabulary, the last ranks may hold only padding."""
        rows, _ = self.spec.shard(self.tp.rank, self.tp.size)
        assert rows is not None
        num_rows = rows.stop - rows.start
        if num_rows:
            fill(self.weight[:num_rows], weights.read(self.spec.name, rows), self.spec.name)
        self.weight[num_rows:].zero_()


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

    Args:
        tied_to: the embedding whose weight this shares (`tie_word_embeddings`); only the embedding
            is loaded then

    Shapes:
        input [S, E], equal on every rank
        output [S, Vl], this rank's slice; `out` if it is given
        weight [Vl, E], this rank's shard
    """

    def __init__(
        self, spec: LinearSpec, context: LayerContext, tied_to: VocabParallelEmbedding | None = None
    ) -> None:
        super().__init__(spec.weights[0], context, tied_to.weight if tied_to else None)
        self.tied = tied_to is not None
        self.matmul = context.matmul

    def forward(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.matmul(hidden, self.weight, out)

    def load(self, weights: WeightSource) -> None:
        if not self.tied:
            super().load(weights)
