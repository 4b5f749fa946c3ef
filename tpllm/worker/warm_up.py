"""Compilation of a model's kernels while its weights are read.

Triton compiles a kernel at its first launch, which takes about a second, and the first step
launches about twenty kernels. Threads launch the kernels that most requests need on tiny inputs,
while the main thread waits for peers and for the disk. Each rank starts at another one of the
kernels that all ranks share, and finds those that peers have compiled in Triton's cache. A kernel
that is missing here is compiled at its first launch in a step, which only costs time.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
import triton
from torch import Tensor

from tpllm.architectures.spec import LinearSpec
from tpllm.channel.row_record import row_words
from tpllm.config.engine_config import EngineConfig
from tpllm.layers.activation import silu_and_mul
from tpllm.layers.all_reduce.all_reduce_norm import all_reduce_norm
from tpllm.layers.all_reduce.overlapped import reduce_and_norm
from tpllm.layers.attention.attention import BACKENDS, Attention, AttentionBatch, make_backend
from tpllm.layers.attention.split_schedule import SPLIT_WORDS, ContextSplit
from tpllm.layers.context import LayerContext
from tpllm.layers.linear.gemv import gemv_triton
from tpllm.layers.linear.matmul import Matmul
from tpllm.layers.norm import RMSNorm
from tpllm.layers.rotary import QKNormRope
from tpllm.parallel.group import TPGroup
from tpllm.parallel.peer_memory import NUM_BUFFERS, WIDTH_MULTIPLE, PeerBuffers
from tpllm.sampling.row_table import SampledRows
from tpllm.sampling.sampler import Subset, best_candidate, local_candidates
from tpllm.sampling.thresholds import Truncation, find_thresholds, likeliest
from tpllm.sampling.token_order import keys_of, rank_and_mass, scores_of
from tpllm.sampling.truncation import drop_below
from tpllm.worker.batch_state import BatchState, gather_decode_inputs
from tpllm.worker.micro_batches import micro_batch_threshold

_MAX_THREADS = 4
# Half of compiling is Python code. A short interval lets the main thread take the interpreter soon:
# it waits for it about a thousand times while it reads the weights.
_SWITCH_INTERVAL_S = 5e-4


class KernelWarmUp:
    """Starts to compile kernels in threads; `wait` returns when all are compiled.

    Args:
        rank, world_size: those of this process; the group need not be connected
    """

    def __init__(
        self, config: EngineConfig, rank: int, world_size: int, device: torch.device
    ) -> None:
        kernels = Kernels(config, rank, world_size, device)
        shared = kernels.shared()
        first = len(shared) * rank // world_size
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        num_threads = min(_MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // world_size))
        self._pool = ThreadPoolExecutor(num_threads, "warm-up", torch.cuda.set_device, (device,))
        # the first thread that uses Triton's driver creates it, and only one may do so
        driver = self._pool.submit(lambda: triton.runtime.driver.active.get_current_device())
        self._launched = [driver]
        # kernels of this rank first: all-reduce is tried as soon as the group is connected
        for each in kernels.of_this_rank() + shared[first:] + shared[:first]:
            self._launched.append(self._pool.submit(_after, driver, each))

    def wait(self) -> None:
        """Wait for all kernels; raise the first error of one."""
        try:
            for each in self._launched:
                each.result()
        finally:
            self._pool.shutdown()
            sys.setswitchinterval(self._switch_interval_s)


def _after(earlier: Future[Any], launch: Callable[[], object]) -> None:
    earlier.result()
    with torch.inference_mode():
        launch()


class Kernels:
    """Launches of the kernels that an engine uses, as calls without arguments."""

    def __init__(
        self, config: EngineConfig, rank: int, world_size: int, device: torch.device
    ) -> None:
        spec = self.spec = config.model_config.spec
        self.block = spec.blocks[0]  # the kernels of one block serve all
        self.config, self.device = config, device
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.tp = TPGroup(rank, world_size, device, process_group=None)  # only for its sizes
        self.context = LayerContext(self.tp, self.dtype, Matmul({}, gemv_triton))
        self.new = partial(torch.zeros, dtype=self.dtype, device=device)
        self.width = spec.hidden_size
        self.norm = RMSNorm(spec.norm, self.context)
        self.norm.weight.zero_()
        self.num_heads, self.num_kv_heads = self.block.attention.local_heads(world_size)
        self.split = ContextSplit(self.num_kv_heads)
        self.has_peer_memory = world_size > 1 and not config.disable_custom_all_reduce
        self.has_peer_memory &= spec.hidden_size % WIDTH_MULTIPLE == 0
        self.local_vocab_size = spec.embedding.local_shape(world_size)[0]
        self.vocab_start = rank * self.local_vocab_size

    def of_this_rank(self) -> list[Callable[[], object]]:
        """Return the launches of all-reduce kernels, which are compiled for one rank."""
        if not self.has_peer_memory:
            return []
        # one-shot, launched early and not; two-shot, a program for each row and for groups of rows
        sizes = [(1, 2), (2, 2), (2, 1), (3, 1)]
        calls: list[Callable[[], object]] = [partial(self.all_reduce_norm, *each) for each in sizes]
        if micro_batch_threshold(self.config, self.dtype):
            calls.append(self.overlapped_all_reduce)
        return calls

    def shared(self) -> list[Callable[[], object]]:
        """Return the launches of kernels that are the same on all ranks."""
        calls = self.of_block()
        row, start = self.new(1, dtype=torch.int64), self.vocab_start
        calls += [self.find_thresholds, self.rank_and_mass, self.sample, self.gather_inputs]
        return [
            *calls,
            lambda: likeliest(self.scores(), 20, start),
            lambda: drop_below(self.scores(), row, start),
            lambda: self.candidates(self.scores(), row, is_compact=True),
            lambda: scores_of(self.new(2, self.local_vocab_size), start, self.spec.vocab_size),
        ]

    def of_block(self) -> list[Callable[[], object]]:
        """Return the launches of a block's kernels, except those of all-reduces."""
        calls: list[Callable[[], object]] = []
        if self.config.attention_backend != "torch":
            with_rope = BACKENDS[self.config.attention_backend].max_rope_rows
            # rotation in the kernel, with early launch or without; rotation before; many programs
            sizes = [1, 2, with_rope + 1]
            sizes.append(next(S for S in count(1) if not self.split.has_large_programs(S)))
            calls += [partial(self.attend, S) for S in sizes]
        if not self.config.disable_custom_matmul:
            calls += self.projections()
        if not self.has_peer_memory:
            rows = [self.new(1, self.width) for _ in range(2)]
            calls += [partial(self.norm, rows[0]), partial(self.norm, *rows)]
        gate_up = self.new(2, self.block.mlp.gate_up.local_shape(self.tp.size)[0])
        return [*calls, partial(silu_and_mul, gate_up)]

    def projections(self) -> list[Callable[[], object]]:
        """Return the launches of linear layers on a single row, with what is fused into them."""
        attention, mlp = self.block.attention, self.block.mlp
        swiglu = {"activation": silu_and_mul}
        fused: list[tuple[LinearSpec, dict[str, Any]]] = [(mlp.down, {}), (mlp.gate_up, swiglu)]
        if self.tp.size == 1:  # a norm without an all-reduce
            norm = {"norm": self.norm}
            added = {**norm, "residual": self.new(1, self.width)}
            fused = [
                (mlp.down, {}),
                (attention.qkv, norm),  # of the first block
                (attention.qkv, added),
                (mlp.gate_up, added | swiglu),
            ]
        elif attention.qkv.biases:
            fused.append((attention.qkv, {}))
        return [
            partial(self.project, linear.has_bias(self.tp.rank), **each) for linear, each in fused
        ]

    def attend(self, S: int) -> None:
        H, K, D = self.num_heads, self.num_kv_heads, self.spec.head_dim
        attention = Attention(H, K, D, make_backend(self.config.attention_backend))
        caches = [self.new(1, self.config.kv_block_size, K, D) for _ in range(2)]
        tables = self.new(S, self.config.max_blocks_per_seq, dtype=torch.int32)
        nothing = self.new(S, dtype=torch.int32)
        plan = self.new(self.split.num_splits(S), SPLIT_WORDS, dtype=torch.int32)
        batch = AttentionBatch(nothing, S, nothing, tables, plan, None)
        cos_sin = self.new(1, D, dtype=torch.float32)
        norm_weights = (self.new(D), self.new(D)) if self.block.attention.qk_norms else None
        rope = QKNormRope(nothing, cos_sin, norm_weights, 1e-6)
        attention(self.new(S, (H + 2 * K) * D), *caches, batch, rope)

    def project(self, has_bias: bool, **fused: Any) -> None:
        weight = self.context.weight_format(32, self.width, self.context)
        for parameter in weight.parameters():
            parameter.zero_()  # Triton's interpreter warns of NaN
        bias = self.new(32) if has_bias else None
        weight.project(self.new(1, self.width), bias=bias, **fused)

    def all_reduce_norm(self, N: int, one_shot_rows: int) -> None:
        """All-reduce N rows, in one shot up to `one_shot_rows`; the peer buffers are full."""
        E, size = self.width, self.tp.size
        rows = self.new(NUM_BUFFERS, size, 4, E)
        pointers = torch.full((size,), rows.data_ptr(), device=self.device)
        places = self.new(4, dtype=torch.int32)
        peers = PeerBuffers(pointers.data_ptr(), places, 4, one_shot_rows, E, self.dtype)
        x, residual = self.new(N, E), self.new(N, E)
        tp = replace(self.tp, peers=peers)
        all_reduce_norm(x, residual, self.norm.weight, 1e-6, tp, has_residual=True)

    def overlapped_all_reduce(self) -> None:
        x, out = self.new(1, self.width), self.new(1, self.width)
        partial_sums = self.new(self.tp.size, 1, self.width)
        reduce_and_norm(x, partial_sums, None, self.norm.weight, out, 1e-6, self.tp)

    def scores(self) -> Tensor:
        rows = self.new(1, dtype=torch.int64)
        logits = self.new(2, self.local_vocab_size)
        return scores_of(logits, self.vocab_start, self.spec.vocab_size, rows)

    def sample(self) -> None:
        """Sample as a step without options; then, beside changed rows, the rows without."""
        self.candidates(self.new(2, self.local_vocab_size), None)
        self.candidates(self.new(2, self.local_vocab_size), self.new(2, dtype=torch.int64))
        best_candidate(self.new(self.tp.size, 2, 2, dtype=torch.int32))  # one candidate per rank

    def candidates(self, logits: Tensor, where: Tensor | None, is_compact: bool = False) -> None:
        rows = self.new(2, dtype=torch.int32)
        table = self.new(1, row_words(), dtype=torch.int32)
        sampled = SampledRows(table, rows, rows.clone())
        vocab = (self.vocab_start, self.spec.vocab_size)
        subset = None if where is None else Subset(where, is_compact)
        best_candidate(local_candidates(logits, sampled, *vocab, subset))

    def find_thresholds(self) -> None:
        """Find thresholds of top-k and top-p together, as in Qwen3's defaults."""
        if self.tp.size == 1:
            row = self.scores().unsqueeze(1)
        else:  # as after the exchange between ranks
            shape = (self.tp.size, 1, self.local_vocab_size)
            row = self.new(*shape, dtype=torch.float32).transpose(0, 1)
        one = self.new(1, dtype=torch.float32)
        find_thresholds(row, Truncation(one, one.int() + 20, one + 0.95, None))

    def rank_and_mass(self) -> None:
        scores = self.scores()
        key = keys_of(scores[:, 0], self.new(1, dtype=torch.int64))
        rank_and_mass(scores, key, scores[:, 0].contiguous(), self.vocab_start)

    def gather_inputs(self) -> None:
        max_blocks = self.config.max_blocks_per_seq
        state = BatchState(1, max_blocks, self.config.kv_block_size, self.device)
        rows, positions = (self.new(1, dtype=torch.int32) for _ in range(2))
        gather_decode_inputs(state, rows, positions, state.decode_inputs(1))
