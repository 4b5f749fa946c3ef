"""Our Qwen3 against transformers': the same logits for every number of ranks and all steps.

Random models are saved by transformers, and its logits for every position of two sequences are
saved beside them. Our model loads the folder in each rank and runs the same tokens through a small
paged cache, in steps that mix whole prompts, decode rows and prompt chunks.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.copy_streams import GlooCopyStream, with_gloo_copy_streams
from tests.peer_buffers import with_shared_peer_buffers
from tests.ranks import run_ranks
from tpllm.config.model_config import ModelConfig
from tpllm.layers.attention.attention import AttentionBatch, KVCache, PrefillBatch
from tpllm.layers.attention.split_schedule import SPLIT_WORDS
from tpllm.layers.context import LayerContext
from tpllm.models.checkpoint_weights import DummyWeights, SafetensorsWeights
from tpllm.models.decoder import Decoder, States, run_blocks
from tpllm.models.decoder import make_model as make_decoder
from tpllm.models.micro_batch import BlockContext, MicroBatch
from tpllm.parallel.collectives import all_gather
from tpllm.parallel.copy_streams import CopyStream
from tpllm.parallel.group import TPGroup

BLOCK_SIZE = 4
MAX_POSITIONS = 32
TOLERANCE = 1e-4  # on logits of standard deviation 1.6; in fp32 they differ by some 6e-6
LENGTHS = [14, 11]
# Blocks of each sequence: out of order, interleaved, and not those that come first.
BLOCK_TABLES = [[5, 2, 9, 3], [8, 1, 7, -1]]
NUM_BLOCKS = 10

VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "head_dim": 32},
}
THREE_HEADS: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 100,
}
SHARDED_FILES = ["tied"]


@dataclass
class Chunk:
    """Tokens [start, stop) of a sequence, computed in one step."""

    sequence: int
    start: int
    stop: int


# Decode rows come first in a step, as the batch layout requires.
STEPS = [
    [Chunk(0, 0, 7), Chunk(1, 0, 3)],  # two whole prompts
    [Chunk(0, 7, 8), Chunk(1, 3, 4)],  # decode only, crossing a block's end
    [Chunk(0, 8, 9), Chunk(1, 4, 9)],  # a decode row beside a chunk with context
    [Chunk(1, 9, 10), Chunk(0, 9, 13)],
    [Chunk(1, 10, 11), Chunk(0, 13, 14)],
]


def make_micro_batch(
    sequences: list[Tensor], chunks: list[Chunk], copy_stream: CopyStream | None = None
) -> MicroBatch:
    input_ids = torch.cat([sequences[c.sequence][c.start : c.stop] for c in chunks])
    positions = torch.cat([torch.arange(c.start, c.stop, dtype=torch.int32) for c in chunks])
    return MicroBatch(input_ids, positions, make_batch(chunks), copy_stream)


def split_in_two(chunks: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """Divide a step into two micro-batches, within its last chunk unless that is a decode row."""
    *others, last = chunks
    if last.stop - last.start == 1:
        return others, [last]
    middle = (last.start + last.stop + 1) // 2
    first, second = replace(last, stop=middle), replace(last, start=middle)
    return [*others, first], [second]


def make_batch(chunks: list[Chunk]) -> AttentionBatch:
    decode = [chunk for chunk in chunks if chunk.stop - chunk.start == 1]
    prefill = chunks[len(decode) :]
    slots = [
        BLOCK_TABLES[chunk.sequence][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for chunk in chunks
        for position in range(chunk.start, chunk.stop)
    ]
    return AttentionBatch(
        slot_mapping=int32(slots),
        num_decode=len(decode),
        context_lens=int32([chunk.stop for chunk in decode]),
        block_tables=block_tables(decode),
        split_schedule=int32([]).view(0, SPLIT_WORDS),  # plain torch needs none
        prefill=make_prefill(prefill, len(decode)) if prefill else None,
    )


def make_prefill(chunks: list[Chunk], num_decode: int) -> PrefillBatch:
    query_lens = [chunk.stop - chunk.start for chunk in chunks]
    key_lens = [chunk.stop for chunk in chunks]
    return PrefillBatch(
        cu_seqlens_q=int32([num_decode, *query_lens]).cumsum(0, dtype=torch.int32),
        cu_seqlens_k=int32([0, *key_lens]).cumsum(0, dtype=torch.int32),
        max_seqlen_q=max(query_lens),
        max_seqlen_k=max(key_lens),
        block_tables=block_tables(chunks),
        has_context=any(chunk.start > 0 for chunk in chunks),
    )


def block_tables(chunks: list[Chunk]) -> Tensor:
    return int32([BLOCK_TABLES[chunk.sequence] for chunk in chunks]).view(len(chunks), 4)


def int32(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_model(config: ModelConfig, context: LayerContext) -> Decoder:
    model = make_decoder(config.architecture, config.spec, context, MAX_POSITIONS)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)  # so that a weight that is not loaded shows
    return model


def make_kv_caches(model: Decoder) -> list[KVCache]:
    shape = (NUM_BLOCKS, BLOCK_SIZE, model.local_num_kv_heads, model.head_dim)
    return [
        (torch.full(shape, torch.nan), torch.full(shape, torch.nan))
        for _ in range(model.num_layers)
    ]


def run_steps(model: Decoder, sequences: list[Tensor], tp: TPGroup) -> list[Tensor]:
    """Return the logits [length, V] of each sequence, computed in steps and gathered over ranks."""
    kv_caches = make_kv_caches(model)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for chunks in STEPS:
        micro_batches = [make_micro_batch(sequences, chunks)]
        if tp.copy_streams:
            micro_batches = [
                make_micro_batch(sequences, some_chunks, copy_stream)
                for some_chunks, copy_stream in zip(
                    split_in_two(chunks), tp.copy_streams, strict=True
                )
            ]
        hidden = model(micro_batches, kv_caches)
        local_logits = model.compute_logits(hidden)
        rows = torch.cat([*all_gather(local_logits, tp)], dim=-1)
        pieces = rows.split([c.stop - c.start for c in chunks])
        for chunk, piece in zip(chunks, pieces, strict=True):
            logits[chunk.sequence].append(piece)
    return [torch.cat(pieces) for pieces in logits]


def logits_equal_transformers(tp: TPGroup, folders: list[Path]) -> None:
    for folder in folders:
        config = ModelConfig.from_folder(folder)
        model = make_model(config, LayerContext(tp, torch.float32))
        model.load(SafetensorsWeights(folder))
        saved = torch.load(folder / "expected.pt")
        found = run_steps(model, saved["sequences"], tp)
        for logits, expected in zip(found, saved["logits"], strict=True):
            logits = logits[:, : config.vocab_size]
            difference = (logits - expected).abs().max().item()  # NaN if a weight is missing
            assert difference < TOLERANCE, f"{folder.name} at TP {tp.size} is off by {difference}"


def logits_equal_transformers_through_peer_buffers(tp: TPGroup, folder: Path) -> None:
    """Steps of more than two tokens are all-reduced in two shots, the others in one."""
    torch.set_num_threads(1)
    hidden_size = ModelConfig.from_folder(folder).hidden_size
    tp = with_shared_peer_buffers(tp, max_rows=4, one_shot_rows=2, E=hidden_size)
    logits_equal_transformers(tp, [folder])


def logits_equal_transformers_in_copy_streams(tp: TPGroup, folder: Path) -> None:
    """Every step has two micro-batches; the second mostly has the first as context."""
    torch.set_num_threads(1)
    hidden_size = ModelConfig.from_folder(folder).hidden_size
    tp = with_gloo_copy_streams(tp, sum(LENGTHS), hidden_size)
    logits_equal_transformers(tp, [folder])
    for copy_stream in tp.copy_streams:
        assert isinstance(copy_stream, GlooCopyStream)
        assert copy_stream.num_rows > 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, changes in {**VARIANTS, "three_heads": THREE_HEADS}.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save_checkpoint(folders[name], changes, sharded=name in SHARDED_FILES)
    return folders


def save_checkpoint(
    folder: Path, changes: dict[str, Any], sharded: bool, family: str = "Qwen3"
) -> None:
    # Imported here, because every rank imports this module and none needs transformers.
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": 4099,  # prime: no TP size divides it
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # fewer than ranks at TP 4
        "head_dim": 16,
        "max_position_embeddings": MAX_POSITIONS,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    config = getattr(transformers, f"{family}Config")(**fields | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms are near 1 but not 1, and biases are not 0, so that a missing one shows.
            parameter.normal_(float("norm" in name), 0.2, generator=generator)
        vocab_size = model.config.vocab_size
        sequences = [torch.randint(vocab_size, (n,), generator=generator) for n in LENGTHS]
        logits = [model(sequence[None]).logits[0] for sequence in sequences]
    model.save_pretrained(folder, max_shard_size="200KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    sequences = [sequence.int() for sequence in sequences]
    torch.save({"sequences": sequences, "logits": logits}, folder / "expected.pt")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logits_equal_transformers(world_size: int, checkpoints: dict[str, Path]) -> None:
    run_ranks(logits_equal_transformers, world_size, [checkpoints[name] for name in VARIANTS])


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
def test_logits_equal_transformers_through_peer_buffers(checkpoints: dict[str, Path]) -> None:
    run_ranks(logits_equal_transformers_through_peer_buffers, 2, checkpoints["untied"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would run on CPU memory")
def test_logits_equal_transformers_in_copy_streams(checkpoints: dict[str, Path]) -> None:
    run_ranks(logits_equal_transformers_in_copy_streams, 2, checkpoints["untied"])


def test_three_kv_heads_on_three_ranks(checkpoints: dict[str, Path]) -> None:
    run_ranks(logits_equal_transformers, 3, [checkpoints["three_heads"]])


def test_a_pipeline_stage_is_a_slice_of_the_blocks(checkpoints: dict[str, Path]) -> None:
    tp = TPGroup.single(torch.device("cpu"))
    folder = checkpoints["untied"]
    model = make_model(ModelConfig.from_folder(folder), LayerContext(tp, torch.float32))
    model.load(SafetensorsWeights(folder))
    batch = make_micro_batch(torch.load(folder / "expected.pt")["sequences"], STEPS[0])
    expected = model([batch], make_kv_caches(model))

    caches = make_kv_caches(model)
    first = BlockContext(batch, {0: caches[0]})
    second = BlockContext(batch, {1: caches[1], 2: caches[2]})
    states: States = [(model.embedding(batch.input_ids), None)]
    states = run_blocks(model.blocks[:2], states, [first])
    [(x, residual)] = run_blocks(model.blocks[2:], states, [second])
    assert torch.equal(model.norm(x, residual)[0], expected)


def test_a_tied_model_keeps_one_copy_of_the_table(checkpoints: dict[str, Path]) -> None:
    tp = TPGroup.single(torch.device("cpu"))
    for name, tied in [("untied", False), ("tied", True)]:
        model = make_model(
            ModelConfig.from_folder(checkpoints[name]), LayerContext(tp, torch.float32)
        )
        assert (model.lm_head.weight is model.embedding.weight) == tied


def test_dummy_weights_fill_every_parameter(checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        config = ModelConfig.from_folder(folder)
        tp = TPGroup.single(torch.device("cpu"))
        model = make_model(config, LayerContext(tp, torch.float32))
        model.load(DummyWeights(config.spec, tp.device, torch.float32))
        assert all(parameter.isfinite().all() for parameter in model.parameters())
