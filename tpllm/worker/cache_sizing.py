"""The number of blocks of the KV cache, from the memory that everything else leaves free."""

from contextlib import suppress
from pathlib import Path

import torch

from tpllm.config.engine_config import EngineConfig
from tpllm.errors import SettingError
from tpllm.parallel.collectives import min_over_ranks
from tpllm.parallel.group import TPGroup
from tpllm.worker.kv_cache import CacheShape
from tpllm.worker.model_runner import ModelRunner
from tpllm.worker.step_times import StepMarks
from tpllm.worker.trial_step import run_largest_steps

# On a CPU the operating system allocates pages when they are written, so this bounds only the
# address space. The other half is for weights, activations and other processes.
_CPU_MEMORY_SHARE = 0.5
# Left free on a GPU for fragmentation and lazily loaded kernels, which cannot be measured before.
_GPU_RESERVE_BYTES = 256 << 20


def cpu_cache_blocks(config: EngineConfig, shape: CacheShape, tp: TPGroup) -> int:
    """Return the number of blocks that fit in half of the host's free memory, shared by the ranks.

    Raises:
        SettingError: less than two blocks fit.
    """
    available = int(_host_bytes() * _CPU_MEMORY_SHARE) // tp.size
    source = "half of the host's free memory"
    num_blocks = _min_blocks(available, shape, tp, source, "free some, or lower max_num_seqs")
    # enough for every row at its maximum length, and the reserved block
    return min(num_blocks, config.max_num_seqs * config.max_blocks_per_seq + 1)


def gpu_cache_blocks(
    config: EngineConfig,
    shape: CacheShape,
    runner: ModelRunner,
    tp: TPGroup,
    free_at_start: int,
    use_graphs: bool,
) -> int:
    """Return the number of blocks that fit beside the largest step and the graphs.

    Runs the largest step and captures graphs on a cache of one block to measure their memory. If
    `num_kv_blocks` is set, only runs the largest step, and returns `num_kv_blocks`.

    Args:
        free_at_start: bytes that were free on the GPU when this process had only its CUDA context;
            memory of other processes is not available

    Raises:
        SettingError: less than two blocks are left on some rank.
    """
    runner.use_cache(shape.allocate(1, tp.device))  # a trial uses only the reserved block
    torch.cuda.reset_peak_memory_stats()
    run_largest_steps(runner, StepMarks(tp.device))
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    # memory of this process outside torch's allocator: kernels, NCCL, workspaces
    held = free_at_start - torch.cuda.mem_get_info()[0]
    other_bytes = max(0, held - torch.cuda.memory_reserved())
    graph_bytes = _graph_bytes(shape, runner, tp) if use_graphs else 0
    total = torch.cuda.get_device_properties(tp.device).total_memory
    budget = min(int(total * config.gpu_memory_utilization), free_at_start)
    used = peak_bytes + other_bytes + graph_bytes + _GPU_RESERVE_BYTES
    source = (
        f"gpu_memory_utilization={config.gpu_memory_utilization:.2f}, {budget / 2**30:.1f} GiB, "
        f"less {used / 2**30:.1f} GiB for weights and work"
    )
    mend = (
        "raise gpu_memory_utilization, use a larger tensor_parallel_size, or lower "
        "max_num_batched_tokens"
    )
    return _min_blocks(budget - used, shape, tp, source, mend)


def _graph_bytes(shape: CacheShape, runner: ModelRunner, tp: TPGroup) -> int:
    """Estimate the bytes of all graphs from the largest graph of either kind and two more."""
    sizes = runner.graph_sizes
    largest_decode = next(size for size in sizes if not size.num_chunks)
    largest_two = list(dict.fromkeys([sizes[0], largest_decode]))
    more = [*sizes[1:2], sizes[-1]]
    free: list[int] = []

    def count_free() -> None:
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])

    count_free()
    runner.capture_graphs([*largest_two, *more], count_free)
    largest, all_of_them = free[0] - free[len(largest_two)], free[0] - free[-1]
    runner.use_cache(shape.allocate(1, tp.device))  # drops the graphs
    torch.cuda.empty_cache()
    each = max(0, all_of_them - largest) / len(more)
    return max(0, largest) + int(each * len(sizes))


def _host_bytes() -> int:
    """Return the free bytes of the host, or of this cgroup; the page cache counts as free."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        limit = int((cgroup / "memory.max").read_text())
        available = min(available, limit - int((cgroup / "memory.current").read_text()))
    return max(0, available)


def _min_blocks(
    available_bytes: int, shape: CacheShape, tp: TPGroup, source: str, mend: str
) -> int:
    """Return the number of blocks that fits on every rank."""
    num_blocks = min_over_ranks(max(0, available_bytes) // shape.block_bytes, tp)
    if num_blocks < 2:
        raise SettingError(
            f"{source}, leaves {num_blocks} KV blocks of {shape.block_bytes / 2**20:.1f} MiB, and "
            f"at least 2 are needed; {mend}"
        )
    return num_blocks
