"""Finds, by measuring, the fastest cuBLASLt algorithm for each of a model's matmuls.

For each weight and each batch size that has a CUDA graph, it tries the algorithms that cuBLAS
suggests, then tile sizes, and then clusters, splits and options of the best of them. Each runs over
enough copies of the weight to exceed the L2, as in a model, where every layer has its own weight.
The best few are measured again from CUDA graphs. The weight's bytes bound a matmul up to about 200
rows, arithmetic beyond. An algorithm that beats torch's matmul by 2 % enters the table of this kind
of GPU, in tpllm/layers/linear/matmul_algorithms/.

    python launch/tune_matmuls.py --model launch/configs/Qwen3-8B --tp 2
"""

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import product as pairs
from pathlib import Path

import torch
from cublaslt_queries import suggestions, tiles
from probe import graph_us
from torch import Tensor

from tpllm.config.model_config import ModelConfig
from tpllm.layers.linear.cublaslt import Algorithm, CublasLtMatmul, Problem
from tpllm.layers.linear.matmul import load_table, save_table
from tpllm.worker.cuda_graphs import decode_sizes

COLD_BYTES = 300 << 20  # several times the L2
COMPUTE_REDUCTION = 2  # of split-K matmuls: float32 sums in a fixed order
CLUSTERS = range(2, 12)
SPLITS = (1, 2, 3, 4)
CUSTOMS = range(8)
MIN_GAIN = 0.02
# The GPU sleeps this long (150 us) while the host launches matmuls, so that they run back to back.
SLEEP_CYCLES = 300_000


class Bench:
    """Times matmuls of one shape."""

    def __init__(self, M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> None:
        device = torch.device("cuda")
        copies = max(2, min(64, COLD_BYTES // (2 * N * K)))
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.weights: Tensor = random(copies, N, K) / K**0.5
        self.x = random(M, K)
        self.out = torch.empty(M, N, device=device, dtype=dtype)
        self.problem = Problem(M, N, K, dtype, device)
        self._next = 0

    def torch_us(self) -> float:
        return self._graph_us(lambda weight: torch.mm(self.x, weight.t(), out=self.out))

    def us(self, matmul: CublasLtMatmul) -> float:
        return self._graph_us(lambda weight: matmul(self.x, weight, self.out))

    def rough_us(self, matmul: CublasLtMatmul) -> float:
        """Return microseconds of a matmul, accurate enough to choose which to measure again."""
        launches = max(2, min(8, len(self.weights)))
        matmul(self.x, self._weight(), self.out)
        torch.cuda._sleep(SLEEP_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(launches):
            matmul(self.x, self._weight(), self.out)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / launches

    def is_right(self, matmul: CublasLtMatmul) -> bool:
        """Whether its error is no larger than the error of torch's matmul."""
        exact = self.x.float() @ self.weights[0].float().t()
        plain_error = (self.x @ self.weights[0].t() - exact).norm()
        self.out.fill_(float("nan"))
        matmul(self.x, self.weights[0], self.out)
        return bool((self.out - exact).norm() <= 1.1 * plain_error)

    def _weight(self) -> Tensor:
        self._next = (self._next + 1) % len(self.weights)
        weight: Tensor = self.weights[self._next]
        return weight

    def _graph_us(self, run: Callable[[Tensor], object]) -> float:
        launches = max(8, len(self.weights))
        return graph_us(lambda: [run(self._weight()) for _ in range(launches)]) / launches


def fastest(bench: Bench, seeds: Iterable[Algorithm]) -> tuple[Algorithm, float, float] | None:
    """Return the algorithm that clearly beats torch, its microseconds and torch's, or None."""
    tried: dict[Algorithm, float] = {}
    matmuls: dict[Algorithm, CublasLtMatmul] = {}

    def try_all(algorithms: Iterable[Algorithm]) -> None:
        for algorithm in algorithms:
            if algorithm.split_k > 1:
                algorithm = algorithm._replace(reduction=COMPUTE_REDUCTION)
            if algorithm not in tried and (made := bench.problem.matmul(algorithm)):
                matmuls[algorithm] = made
                tried[algorithm] = bench.rough_us(made)

    def best(number: int) -> list[Algorithm]:
        return sorted(tried, key=lambda algorithm: tried[algorithm])[:number]

    try_all([*suggestions(bench.problem), *seeds])
    (first,) = best(1)
    for cluster, custom in pairs({first.cluster_shape, 2, 3}, {first.custom, 0}):
        shaped = first._replace(cluster_shape=cluster, custom=custom)
        try_all(shaped._replace(tile=tile) for tile in tiles(bench.problem, first))
    for algorithm in best(4):
        try_all(algorithm._replace(cluster_shape=cluster) for cluster in CLUSTERS)
        try_all(algorithm._replace(split_k=split, reduction=0) for split in SPLITS)
        try_all(algorithm._replace(custom=custom) for custom in CUSTOMS)
    timed = {algorithm: bench.us(matmuls[algorithm]) for algorithm in best(6)}
    winner = min(timed, key=lambda algorithm: timed[algorithm])
    torch_us = bench.torch_us()
    if timed[winner] > (1 - MIN_GAIN) * torch_us or not bench.is_right(matmuls[winner]):
        return None
    return winner, timed[winner], torch_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor_parallel_size")
    parser.add_argument("--weights", nargs="+", help="some of qkv, o, gate_up, down, lm_head")
    parser.add_argument(
        "--rows", type=int, nargs=2, default=[2, 256], metavar=("MIN", "MAX"), help="batch sizes"
    )
    args = parser.parse_args()
    sizes = [M for M in decode_sizes(256) if args.rows[0] <= M <= args.rows[1]]
    gpu = torch.cuda.get_device_name()
    table = load_table(gpu)
    begin = time.perf_counter()
    for linear in ModelConfig.from_folder(args.model).spec.linears():
        N, K = linear.local_shape(args.tp)
        if args.weights and linear.name not in args.weights:
            continue
        seeds: list[Algorithm] = []
        for M in reversed(sizes):
            found = fastest(Bench(M, N, K), seeds[-6:])
            table.pop((M, N, K), None)
            line = "torch"
            if found:
                algorithm, us, torch_us = found
                table[M, N, K] = algorithm
                seeds.append(algorithm)
                line = f"{us:7.1f} us, torch {torch_us:7.1f} us, {1 - us / torch_us:5.1%} less"
            seconds = time.perf_counter() - begin
            print(f"{linear.name:8} {M:4} rows: {line}  [{seconds:.0f} s]", flush=True)
        save_table(gpu, table)


if __name__ == "__main__":
    main()
