"""Computes what the hardware allows: tokens per second on workload "seed", and the time of a step.

Prompts are prefilled once, then all sequences decode in lockstep. Every matmul and every attention
takes the longer of two times: its bytes at the memory's bandwidth, and its operations at the matrix
units' rate. On several GPUs each of two all-reduces a layer takes 5 us plus its bytes at the link's
bandwidth. Nothing else takes time.

    python launch/limit.py --model launch/configs/Qwen3-8B --tp 2
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tpllm.architectures.spec import LinearSpec
from tpllm.cli.bench.workloads import seed_workload
from tpllm.config.model_config import ModelConfig

ALL_REDUCE_S = 5e-6
BYTES = 2  # of an element, in half precision


@dataclass(frozen=True)
class Limit:
    """The shortest steps of a model on `tp` GPUs with these rates (see probe.py)."""

    config: ModelConfig
    tp: int
    copy_TB_per_s: float
    matmul_TFLOP_per_s: float
    peer_copy_GB_per_s: float = float("inf")

    def decode_step_s(self, num_seqs: int, num_keys: float) -> float:
        """Return seconds of a step: `num_seqs` sequences attend to `num_keys` tokens in all."""
        return self.step_s(num_seqs, num_seqs, num_keys, num_keys)

    def step_s(self, num_tokens: int, num_sampled: int, num_keys: float, num_pairs: float) -> float:
        """Return seconds of a step.

        Args:
            num_tokens: tokens that are computed
            num_sampled: tokens that are sampled
            num_keys: tokens whose keys and values each layer reads
            num_pairs: pairs of query and key that attention multiplies
        """
        spec = self.config.spec
        seconds = self._matmul_s(num_sampled, spec.head)
        for block in spec.blocks:
            seconds += sum(self._matmul_s(num_tokens, linear) for linear in block.linears())
            H, K, D = block.attention.num_heads, block.attention.num_kv_heads, spec.head_dim
            seconds += self._longer_s(num_keys * 2 * K * D * BYTES, 4 * num_pairs * H * D)
        if self.tp > 1:
            link_s = num_tokens * spec.hidden_size * BYTES / (self.peer_copy_GB_per_s * 1e9)
            seconds += 2 * len(spec.blocks) * (ALL_REDUCE_S + link_s)
        return seconds

    def _matmul_s(self, M: int, linear: LinearSpec) -> float:
        N, K = linear.local_shape(1)  # the GPUs share the work: see `_longer_s`
        return self._longer_s(N * K * BYTES, 2 * M * N * K)

    def _longer_s(self, num_bytes: float, flops: float) -> float:
        """Return seconds of work that all GPUs share."""
        bandwidth, rate = self.copy_TB_per_s * 1e12, self.matmul_TFLOP_per_s * 1e12
        return max(num_bytes / bandwidth, flops / rate) / self.tp


def seed_limit(limit: Limit) -> float:
    """Return the output tokens per second on workload "seed" that no engine can exceed."""
    prompts, params = seed_workload(limit.config.vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    outputs = [each.max_tokens or 0 for each in params]
    num_pairs = sum(length**2 / 2 for length in lengths)
    seconds = limit.step_s(sum(lengths), len(lengths), sum(lengths), num_pairs)
    for step in range(1, max(outputs)):  # the first token comes from the prompt
        running = zip(lengths, outputs, strict=True)
        contexts = [length + step for length, output in running if output > step]
        seconds += limit.decode_step_s(len(contexts), sum(contexts))
    return sum(outputs) / seconds


def measured_rates() -> dict[str, float] | None:
    """Measure the rates of `Limit` with probe.py, by name; None if it cannot run.

    It runs in a process of its own, so that this process holds nothing of the GPU.
    """
    probe = [sys.executable, str(Path(__file__).with_name("probe.py"))]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="number of GPUs")
    parser.add_argument("--copy", type=float, default=4.3, help="TB/s (default: an H200's)")
    parser.add_argument("--matmul", type=float, default=790, help="TFLOP/s in bf16")
    parser.add_argument("--link", type=float, default=400, help="GB/s between two GPUs")
    args = parser.parse_args()
    config = ModelConfig.from_folder(args.model)
    limit = Limit(config, args.tp, args.copy, args.matmul, args.link)
    print(f"{seed_limit(limit):.0f} output tokens/s")


if __name__ == "__main__":
    main()
