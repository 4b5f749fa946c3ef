"""Vocabulary-parallel embedding and LM head against the whole table, at any vocabulary size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from tpllm.architectures.spec import LinearSpec, Sharding, WeightSpec
from tpllm.layers.context import LayerContext
from tpllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tpllm.parallel.collectives import all_gather, all_reduce
from tpllm.parallel.group import TPGroup

E = 6
SMALL, PRIME, EVEN = 5, 4099, 16  # at TP 4 a vocabulary of 5 leaves the last rank only padding


def table(vocab_size: int) -> WeightSpec:
    sharding = Sharding(0, vocab_size, "vocab_size", uneven="pad")
    return WeightSpec("table.weight", (vocab_size, E), sharding)


class OneTable:
    """A `WeightSource` with one table for every name."""

    def __init__(self, vocab_size: int) -> None:
        self.table = torch.randn(vocab_size, E, generator=torch.Generator().manual_seed(0))

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        assert rows is not None
        assert 0 <= rows.start < rows.stop <= len(self.table)
        return self.table[rows]


def sharded_vocabulary_equals_whole_table(tp: TPGroup) -> None:
    for vocab_size in [SMALL, EVEN, PRIME]:
        weights = OneTable(vocab_size)
        context = LayerContext(tp, torch.float32)
        embedding = VocabParallelEmbedding(table(vocab_size), context)
        lm_head = ParallelLMHead(LinearSpec("lm_head", (table(vocab_size),)), context)
        for layer in [embedding, lm_head]:
            layer.weight.fill_(torch.nan)  # so that a row that is not loaded shows
            layer.load(weights)

        ids = torch.arange(vocab_size, dtype=torch.int32).flip(0)
        assert torch.equal(all_reduce(embedding(ids), tp), weights.table.flip(0))
        assert torch.equal(all_reduce(embedding(ids[:1]), tp), weights.table[-1:])

        hidden = torch.randn(3, E, generator=torch.Generator().manual_seed(1))
        local_logits = lm_head(hidden)
        assert local_logits.shape == (3, lm_head.local_vocab_size)
        assert lm_head.vocab_start == tp.rank * lm_head.local_vocab_size
        logits = torch.cat([*all_gather(local_logits, tp)], dim=-1)
        torch.testing.assert_close(logits[:, :vocab_size], F.linear(hidden, weights.table))
        assert not logits[:, vocab_size:].any()  # padding rows of the weight are zero


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_vocabulary_equals_whole_table(world_size: int) -> None:
    run_ranks(sharded_vocabulary_equals_whole_table, world_size)


def test_tied_lm_head_shares_the_embedding_weight() -> None:
    tp = TPGroup.single(torch.device("cpu"))
    context = LayerContext(tp, torch.float32)
    embedding = VocabParallelEmbedding(table(SMALL), context)
    lm_head = ParallelLMHead(LinearSpec("lm_head", (table(SMALL),)), context, embedding)
    embedding.load(OneTable(SMALL))
    assert lm_head.weight.data_ptr() == embedding.weight.data_ptr()
    assert len({*embedding.parameters(), *lm_head.parameters()}) == 1
