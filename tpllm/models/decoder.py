"""A decoder-only model: embedding, a list of blocks, final norm, LM head.

Shape letters: N tokens, S sequences, E hidden_size, Vl this rank's share of the vocabulary.

The N tokens are those of all sequences in a step or in a micro-batch, concatenated without padding.
A block maps `(x, residual, context)` to `(x, residual)`. x [N, E] is this rank's partial sum of the
last block's output, and the block begins with the norm that all-reduces it and adds it to the
residual stream [N, E]. So norm and addition take one pass over memory. The list has attention and
MLP as blocks of their own, because between two blocks an all-reduce can overlap with the other
micro-batch. A pipeline stage is a slice of the list.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tpllm.architectures.registry import family_named
from tpllm.architectures.spec import ModelSpec
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm
from tpllm.layers.context import LayerContext
from tpllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tpllm.layers.weights import Layer, WeightSource
from tpllm.models.micro_batch import BlockContext, KVCaches, MicroBatch

# of each micro-batch: x [N, E] and the residual stream, None before the first block
States = list[tuple[Tensor, Tensor | None]]


def run_blocks(
    blocks: Iterable[nn.Module], states: States, contexts: Sequence[BlockContext]
) -> States:
    """Run each block for every micro-batch: one computes while another is all-reduced."""
    for block in blocks:
        outputs = []
        for (x, residual), context in zip(states, contexts, strict=True):
            with context.batch.computing():
                outputs.append(block(x, residual, context))
        states = outputs
    return states


class Decoder(nn.Module):
    """A rank's shard of a model, as a worker runs it.

    Attributes:
        num_layers, local_num_kv_heads, head_dim: a token's share of this rank's KV cache is
            `2 * num_layers * local_num_kv_heads * head_dim` elements
        lm_head: the columns of the logits are `local_vocab_size` ids from its `vocab_start` on

    Raises:
        ValueError: `tp.size` does not divide the model; `ModelConfig.check_parallel` checks this
            before any worker starts.
    """

    if TYPE_CHECKING:  # torch's modules return Any

        def __call__(self, micro_batches: Sequence[MicroBatch], kv_caches: KVCaches) -> Tensor: ...

    def __init__(self, spec: ModelSpec, context: LayerContext, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(spec.embedding, context)
        self.blocks = nn.ModuleList(blocks)
        self.norm = AllReduceRMSNorm(spec.norm, context)
        self.lm_head = ParallelLMHead(
            spec.head, context, tied_to=self.embedding if spec.tied else None
        )
        attention = spec.blocks[0].attention
        self.num_layers = len(spec.blocks)
        _, self.local_num_kv_heads = attention.local_heads(context.tp.size)
        self.head_dim = attention.head_dim

    def forward(self, micro_batches: Sequence[MicroBatch], kv_caches: KVCaches) -> Tensor:
        """Run the N tokens of a step through the model and write their keys and values.

        Args:
            micro_batches: those of the step; each attends to itself and to the ones before it
            kv_caches: a pair per layer, each [num_blocks, block_size, local_num_kv_heads, head_dim]

        Returns:
            Hidden states [N, E] after the final norm, equal on every rank.
        """
        states: States = []
        for batch in micro_batches:
            with batch.computing():
                states.append((self.embedding(batch.input_ids), None))
        contexts = [BlockContext(batch, kv_caches) for batch in micro_batches]
        states = run_blocks(self.blocks, states, contexts)
        hidden = [
            self.norm(x, residual, batch.copy_stream)[0]
            for (x, residual), batch in zip(states, micro_batches, strict=True)
        ]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits [S, Vl] of this rank's vocabulary for hidden [S, E], the sampled rows.

        If `out` is given, they are written to it.
        """
        logits: Tensor = self.lm_head(hidden, out)
        return logits

    def load(self, weights: WeightSource) -> None:
        """Read this rank's shard of every weight, each by the names of its layer's spec."""
        for module in self.modules():
            if isinstance(module, Layer):
                module.load(weights)


def make_model(
    architecture: str, spec: ModelSpec, context: LayerContext, max_positions: int
) -> Decoder:
    """Return a model of a known architecture, without weights.

    Only the module of this architecture is imported.

    Args:
        max_positions: the longest sequence in tokens
    """
    module, name = family_named(architecture).blocks.split(":")
    make_blocks = getattr(import_module(module), name)
    return Decoder(spec, context, make_blocks(spec, context, max_positions))
