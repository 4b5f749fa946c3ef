"""Stress-tests the fused all-reduces over peer memory: can they be made to go wrong?

Calls the kernel that all-reduces partial sums, adds the residual and norms
(tpllm/layers/all_reduce/all_reduce_norm.py) with random numbers of rows, new random values each
time, and ranks that are late at random. Calls come in chains. Within a chain only the kernel's own
exchange, and now and then an all-gather, keeps the ranks together. Half of the chains are replayed
from CUDA graphs and the others launched kernel by kernel. A third of the latter alternate between
the two copy streams of large steps (tpllm/layers/all_reduce/overlapped.py).

After a chain, each sum is compared with NCCL's in float32 plus the residual, and each normed row
with the plain norm of that sum. The kernel adds in float32 and rounds once, so a sum may be off by
half a unit in its last place. A normed value is rounded twice, and each rounding may go the other
way: two units. All ranks must have the same bits. Errors are counted on the GPU and read every
1,000 calls.

Without GPUs the layer all-reduces over Gloo in float32, which only tests this script.

Prints the outcome, then one JSON line. The exit code is 1 if a sum was wrong, the ranks differed, a
rank failed, or the ranks hung.

    python launch/stress_all_reduce.py --calls 100000 --tp 2 --restarts 3
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpllm.architectures.spec import NormSpec, WeightSpec
from tpllm.layers.all_reduce.all_reduce_norm import AllReduceRMSNorm, kept_rows
from tpllm.layers.all_reduce.trial import copy_streams_work, peer_memory_works
from tpllm.layers.context import LayerContext
from tpllm.layers.norm import rms_norm_reference
from tpllm.parallel.collectives import (
    all_gather,
    all_reduce,
    min_over_ranks,
    with_copy_streams,
    with_peer_memory,
)
from tpllm.parallel.copy_streams import NUM_COPY_STREAMS
from tpllm.parallel.group import TPGroup

WIDTHS = (1024, 4096, 5120)  # hidden sizes of Qwen3 0.6B, 8B and 32B
EPS = 1e-6
MAX_ROWS_WITHOUT_PEERS = 8
MAX_CHAIN = 8  # calls
GRAPHS_PER_WIDTH = 4
READ_EVERY = 1000  # calls
LATE_SHARE, GATHER_SHARE = 0.1, 0.1  # of the calls
COPY_STREAMS_SHARE = 1 / 3  # of the chains that are launched kernel by kernel
MAX_SLEEP_CYCLES = 400_000  # 0.2 ms; an all-reduce of one row takes 0.01 ms
END_S = 20.0  # time for a finished rank to end
LARGEST = 64.0  # upper bound of the sums: the partial sums are normally distributed


@dataclass(frozen=True)
class Call:
    """One all-reduce, the same on every rank: its number of rows, and what precedes it.

    Attributes:
        num_rows: number of rows
        first_residual: the first row of its residual in the pool; None for no residual
        late: the rank that is late, or None
        sleep: the delay, as a share of the longest
        gathers: whether an all-gather precedes it
    """

    num_rows: int
    first_residual: int | None
    late: int | None
    sleep: float
    gathers: bool


def sample_chain(numbers: random.Random, size: int, max_rows: int) -> list[Call]:
    """Return random calls; half of them have few rows."""
    return [
        Call(
            num_rows=numbers.randint(1, numbers.choice([max_rows, min(8, max_rows)])),
            first_residual=numbers.randrange(max_rows) if numbers.random() < 0.8 else None,
            late=numbers.randrange(size) if numbers.random() < LATE_SHARE else None,
            sleep=numbers.random(),
            gathers=numbers.random() < GATHER_SHARE,
        )
        for _ in range(numbers.randint(1, MAX_CHAIN))
    ]


class Errors:
    """The errors so far, counted on the device that computed the values.

    Attributes:
        wrong: number of values beyond their bound
        worst: the largest error, as a multiple of its bound
        checksum: checksum of all normed rows, in order
    """

    def __init__(self, device: torch.device) -> None:
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.worst = torch.zeros((), dtype=torch.float32, device=device)
        self.checksum = torch.zeros((), dtype=torch.int64, device=device)

    def compare(self, actual: Tensor, expected: Tensor, relative: float, absolute: float) -> None:
        if not len(actual):  # with few rows, a rank may keep none
            return
        expected = expected.float()
        bound = expected.abs() * relative + absolute
        error = (actual.float() - expected).abs()
        self.wrong += (~(error <= bound)).sum()  # NaN is wrong, too
        torch.maximum(self.worst, (error / bound).max(), out=self.worst)

    def add_bits(self, rows: Tensor) -> None:
        bits = rows.view(torch.int16 if rows.dtype.itemsize == 2 else torch.int32)
        self.checksum.mul_(31).add_(bits.sum(dtype=torch.int64))


class FusedAllReduces:
    """The fused all-reduces of one hidden size, and their check."""

    def __init__(self, tp: TPGroup, width: int, errors: Errors, max_rows: int | None) -> None:
        self.dtype = torch.bfloat16 if tp.device.type == "cuda" else torch.float32
        self.tp = with_peer_memory(tp, width, self.dtype)
        if tp.device.type == "cuda":
            assert self.tp.peers is not None, (
                "these GPUs share no memory: NCCL does every all-reduce"
            )
            assert peer_memory_works(self.tp), "all-reduces are wrong at the start"
        # up to half of the large all-reduces are two-shot, in several rounds of the peer buffers
        limit = 2 * self.tp.peers.max_rows if self.tp.peers else MAX_ROWS_WITHOUT_PEERS
        self.max_rows = min(limit, max_rows or limit)
        if tp.device.type == "cuda":
            self.tp = with_copy_streams(self.tp, self.max_rows)
            assert self.tp.copy_streams, "these GPUs have no stream memory operations"
            assert copy_streams_work(self.tp), "all-reduces in copy streams are wrong at the start"
        self.width = width
        self._errors = errors
        self._norm = AllReduceRMSNorm(
            NormSpec(WeightSpec("norm.weight", (width,)), EPS), LayerContext(self.tp, self.dtype)
        )
        same = torch.Generator().manual_seed(width)  # the same on all ranks
        self._norm.weight.data.copy_(0.5 + torch.rand(width, generator=same))
        pool = torch.randn(2 * self.max_rows, width, generator=same)
        self._residuals = pool.to(tp.device, self.dtype)
        self._something = torch.ones(64, device=tp.device)

    @torch.inference_mode()
    def run(self, chain: list[Call]) -> None:
        """Run the calls of a chain back to back, then check each result."""
        partial_sums = [self._partial_sum(call) for call in chain]
        residuals = [self._residual(call) for call in chain]
        results = []
        for call, partial_sum, residual in zip(chain, partial_sums, residuals, strict=True):
            self._precede(call)
            stream = None if residual is None else residual.clone()
            results.append(self._norm(partial_sum.clone(), stream))  # NCCL would work in place
        for partial_sum, residual, (normed, total) in zip(
            partial_sums, residuals, results, strict=True
        ):
            kept = kept_rows(len(partial_sum), self.tp)
            self._check(partial_sum, residual, normed, total[kept], kept)

    @torch.inference_mode()
    def run_in_copy_streams(self, chain: list[Call]) -> None:
        """Run a chain alternating between the copy streams, then check each result.

        What precedes an all-reduce runs beside the all-reduce before it.
        """
        partial_sums = [self._partial_sum(call) for call in chain]
        residuals = [self._residual(call) for call in chain]
        streams: list[Tensor | None] = []
        results: list[tuple[Tensor, Tensor]] = []
        for i in range(len(chain) + 1):
            if i < len(chain):
                copy_stream, residual = self.tp.copy_streams[i % NUM_COPY_STREAMS], residuals[i]
                with copy_stream.computing():
                    self._precede(chain[i])
                    ours = copy_stream.share(chain[i].num_rows)
                    streams.append(None if residual is None else residual[ours].clone())
            if i > 0:
                copy_stream = self.tp.copy_streams[(i - 1) % NUM_COPY_STREAMS]
                normed, total = self._norm(partial_sums[i - 1], streams[i - 1], copy_stream)
                results.append(
                    (normed.clone(), total)
                )  # the copy stream's next outputs overwrite it
        for i, (partial_sum, residual) in enumerate(zip(partial_sums, residuals, strict=True)):
            kept = self.tp.copy_streams[i % NUM_COPY_STREAMS].share(len(partial_sum))
            self._check(partial_sum, residual, *results[i], kept)

    def _precede(self, call: Call) -> None:
        if call.late == self.tp.rank:
            _sleep(call.sleep, self.tp.device)
        if call.gathers:
            all_gather(self._something, self.tp)

    def _partial_sum(self, call: Call) -> Tensor:
        partial_sum = torch.empty(
            call.num_rows, self.width, dtype=self.dtype, device=self.tp.device
        )
        partial_sum.normal_()
        partial_sum[:, ::7] = -0.0  # values that look like an empty peer buffer
        return partial_sum

    def _residual(self, call: Call) -> Tensor | None:
        first = call.first_residual
        return None if first is None else self._residuals[first : first + call.num_rows]

    def _check(
        self,
        partial_sum: Tensor,
        residual: Tensor | None,
        normed: Tensor,
        total: Tensor,
        kept: slice,
    ) -> None:
        """Compare normed [N, E] and `total`, the sum in the rows that this rank keeps."""
        expected = all_reduce(partial_sum.float(), self.tp)
        if residual is not None:
            expected += residual.float()
        half_unit = torch.finfo(self.dtype).eps / 2
        # in float32 the order of additions matters: one rounding for each partial result
        order = (self.tp.size + 1) * LARGEST * torch.finfo(torch.float32).eps
        self._errors.compare(total, expected[kept], half_unit, order)
        plain = rms_norm_reference(total, self._norm.weight, EPS)
        self._errors.compare(normed[kept], plain, 4 * half_unit, 1e-6)
        self._errors.add_bits(normed)

    def graph_of(self, chain: list[Call]) -> torch.cuda.CUDAGraph:
        self.run(chain)  # compiles kernels and lets libraries allocate, outside capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread may query events while this thread captures
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run(chain)
        return graph


def _sleep(share: float, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(int(share * MAX_SLEEP_CYCLES))
    else:
        time.sleep(share * 1e-3)


def stress(
    tp: TPGroup, num_calls: int, seed: int, max_rows: int | None = None
) -> Iterator[dict[str, Any]]:
    """Make at least `num_calls` calls; yield figures every 1,000 calls and at the end.

    The figures: calls, how many of them were replayed from graphs and how many ran in copy streams,
    wrong values and the worst error of this rank, and whether all ranks are correct and have the
    same bits.
    """
    errors = Errors(tp.device)
    numbers = random.Random(seed)  # the same on all ranks
    torch.manual_seed(seed * tp.size + tp.rank)  # also the GPU's generator
    all_reduces = [FusedAllReduces(tp, width, errors, max_rows) for width in WIDTHS]
    graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []
    if tp.device.type == "cuda":
        for each in all_reduces * GRAPHS_PER_WIDTH:
            chain = sample_chain(numbers, tp.size, each.max_rows)
            graphs.append((each.graph_of(chain), len(chain)))
    num_done = num_replayed = num_in_copy_streams = num_read = 0
    while num_done < num_calls:
        if graphs and num_replayed * 2 <= num_done:
            graph, length = numbers.choice(graphs)
            is_late, late = numbers.random() < LATE_SHARE, numbers.randrange(tp.size)
            sleep = numbers.random()
            if is_late and late == tp.rank:
                _sleep(sleep, tp.device)
            graph.replay()
            num_replayed += length
        else:
            each = numbers.choice(all_reduces)
            chain = sample_chain(numbers, tp.size, each.max_rows)
            length = len(chain)
            if each.tp.copy_streams and numbers.random() < COPY_STREAMS_SHARE:
                each.run_in_copy_streams(chain)
                num_in_copy_streams += length
            else:
                each.run(chain)
        num_done += length
        if num_done - num_read >= READ_EVERY or num_done >= num_calls:
            num_read = num_done
            counts = {
                "calls": num_done,
                "replayed": num_replayed,
                "in_copy_streams": num_in_copy_streams,
            }
            yield counts | _figures(errors, tp)


def _figures(errors: Errors, tp: TPGroup) -> dict[str, Any]:
    wrong = int(errors.wrong)
    checksums = all_gather(errors.checksum, tp)
    is_right = wrong == 0 and bool((checksums == checksums[0]).all())
    return {
        "wrong": wrong,
        "worst": round(float(errors.worst), 4),
        "right": bool(min_over_ranks(int(is_right), tp)),
    }


def run_rank(rank: int, args: argparse.Namespace, life: int, store: str, pipe: Connection) -> None:
    """Run one rank; it sends its last figures, or its traceback, into the pipe."""
    try:
        device = torch.device("cpu")
        if args.device == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        torch.set_num_threads(1)
        os.environ["TMPDIR"] = str(Path(store).parent)  # for sockets of symmetric memory
        tp = TPGroup.connect(rank, args.tp, device, store, args.timeout_s)
        num_calls = -(-args.calls // (1 + args.restarts))
        for figures in stress(tp, num_calls, args.seed + life, args.max_rows):
            if not figures["right"]:
                break
        figures["gpu"] = torch.cuda.get_device_name(device) if args.device == "cuda" else None
        pipe.send(figures)
        tp.close()
    except BaseException:
        pipe.send({"error": traceback.format_exc()})
        raise SystemExit(1) from None


def run_ranks(args: argparse.Namespace, life: int) -> list[dict[str, Any]]:
    """Return the outcome of each rank, in new processes that end with this call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # once, and not in every rank
    deadline = time.monotonic() + args.timeout_s
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        try:
            for rank in range(args.tp):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (rank, args, life, str(Path(folder) / "store"), theirs)
                ranks.append(context.Process(target=run_rank, args=arguments))
                ranks[-1].start()
                theirs.close()  # so that the pipe ends when the rank ends
                pipes.append(ours)
            outcomes = receive(pipes, deadline)
            if not any("error" in outcome for outcome in outcomes):
                for rank, process in enumerate(ranks):
                    process.join(END_S)
                    if process.exitcode != 0:
                        outcomes[rank] |= {"right": False, "error": "did not end in order"}
            return outcomes
        finally:
            for process in ranks:
                process.kill()
                process.join()


def receive(pipes: list[Connection], deadline: float) -> list[dict[str, Any]]:
    outcomes = [{"error": "hung"} for _ in pipes]
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left_s):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                outcomes[rank] = pipe.recv()
            except EOFError:
                outcomes[rank] = {"error": "ended without figures"}
            if "error" in outcomes[rank]:
                return outcomes  # the other ranks may wait for it for ever
    return outcomes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000, help="total over all restarts")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="ranks, a GPU each")
    parser.add_argument(
        "--restarts", type=int, default=0, help="how often to start again in new processes"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--max-rows", type=int, help="default: what peer memory holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timeout-s", type=float, default=300.0, help="ranks that take longer count as hung"
    )
    args = parser.parse_args()
    if args.calls < 1 or args.restarts < 0:
        parser.error(
            f"--calls {args.calls} --restarts {args.restarts}: use --calls 1 or more and "
            "--restarts 0 or more"
        )
    if args.device == "cuda" and args.tp < 2:
        parser.error(f"--tp {args.tp} has nothing to reduce; use 2 or more")
    return args


def main() -> None:
    args = parse_arguments()
    result: dict[str, Any] = {"arguments": vars(args), "torch": torch.__version__, "lives": []}
    is_right = True
    begin = time.perf_counter()
    for life in range(1 + args.restarts):
        life_begin = time.perf_counter()
        outcomes = run_ranks(args, life)
        seconds = round(time.perf_counter() - life_begin, 1)
        for rank, outcome in enumerate(outcomes):
            is_right &= outcome.get("right", False)
            figures_text = "  ".join(f"{name} {value}" for name, value in outcome.items())
            print(f"life {life}, rank {rank}, {seconds} s: {figures_text}", flush=True)
        result["lives"].append({"seconds": seconds, "ranks": outcomes})
        if not is_right:
            break
    result["seconds"] = round(time.perf_counter() - begin, 1)
    result["calls"] = sum(each["ranks"][0].get("calls", 0) for each in result["lives"])
    result["right"] = is_right
    print(json.dumps(result))
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
