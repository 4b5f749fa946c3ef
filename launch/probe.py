"""Measures the hardware's rates, which a benchmark prints beside its figures.

Prints one JSON line: device copy (TB/s, bytes read plus bytes written), bf16 matmul (TFLOP/s, on
random data), and, with two GPUs or more, a copy from GPU 0 to GPU 1 (GB/s).

    python launch/probe.py
"""

import json
from collections.abc import Callable

import torch


def median_s(run: Callable[[], object], repeats: int = 20) -> float:
    """Return the median seconds of one call, by device events, after a warm-up."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


def graph_us(run: Callable[[], object], repeats: int = 10) -> float:
    """Return the median microseconds of `run`, replayed as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_s(graph.replay, repeats) * 1e6


def probe() -> dict[str, float]:
    torch.manual_seed(0)
    size = 4 << 30
    source = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source)
    figures = {"copy_TB_per_s": 2 * size / median_s(lambda: target.copy_(source)) / 1e12}
    n = 8192
    a, b = (torch.randn(n, n, device="cuda:0", dtype=torch.bfloat16) for _ in range(2))
    figures["matmul_TFLOP_per_s"] = 2 * n**3 / median_s(lambda: a @ b) / 1e12
    if torch.cuda.device_count() > 1:
        peer = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
        seconds = median_s(lambda: peer.copy_(source[: 1 << 30]))
        figures["peer_copy_GB_per_s"] = (1 << 30) / seconds / 1e9
    return {name: round(value, 2) for name, value in figures.items()}


if __name__ == "__main__":
    print(json.dumps(probe()))
