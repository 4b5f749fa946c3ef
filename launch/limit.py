"""What the hardware allows: output tokens per second on workload "seed", and the time of a step.

Prompts are prefilled once, then all sequences decode in lockstep; every matmul and every attention
takes the longer of its bytes at the memory's speed and its operations at the matrix units'; on
several GPUs two all-reduces a layer take 5 us each and their bytes the link's time; nothing else
costs anything.

    python launch/limit.py --model launch/configs/Qwen3-8B --tp 2
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tpllm.cli.bench.workloads import seed_workload
from tpllm.config.model_config import ModelConfig

ALL_REDUCE_S = 5e-6
BYTES = 2  # of an element, in half precision


def weight_shapes(config: ModelConfig, tp: int) -> dict[str, tuple[int, int]]:
    """[N, K] of a rank's weights, by their names."""
    E, D, I = config.hidden_size, config.head_dim, config.intermediate_size // tp
    heads = config.num_attention_heads // tp
    kv_heads = max(1, config.num_key_value_heads // tp)
    return {
        "qkv": ((heads + 2 * kv_heads) * D, E),
        "o": (E, heads * D),
        "gate_up": (2 * I, E),
        "down": (E, I),
        "lm_head": (-(-config.vocab_size // tp), E),
    }


@dataclass(frozen=True)
class Limit:
    """The shortest steps of a model on `tp` GPUs of these rates (see probe.py)."""

    config: ModelConfig
    tp: int
    copy_TB_per_s: float
    matmul_TFLOP_per_s: float
    peer_copy_GB_per_s: float = float("inf")

    def decode_step_s(self, num_seqs: int, num_keys: float) -> float:
        """A token for each of `num_seqs` sequences, which attend to `num_keys` tokens together."""
        return self.step_s(num_seqs, num_seqs, num_keys, num_keys)

    def step_s(self, num_tokens: int, num_drawn: int, num_keys: float, num_pairs: float) -> float:
        """Computes `num_tokens`, draws `num_drawn`, reads `num_keys` keys and values of each layer
        and multiplies `num_pairs` of query and key.
        """
        config = self.config
        E, L = config.hidden_size, config.num_hidden_layers
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shapes = weight_shapes(config, tp=1)  # the GPUs share the work: see `_longer_s`
        lm_head = shapes.pop("lm_head")
        layer_s = sum(self._matmul_s(num_tokens, *shape) for shape in shapes.values())
        layer_s += self._longer_s(num_keys * 2 * K * D * BYTES, 4 * num_pairs * H * D)
        if self.tp > 1:
            layer_s += 2 * (ALL_REDUCE_S + num_tokens * E * BYTES / (self.peer_copy_GB_per_s * 1e9))
        return L * layer_s + self._matmul_s(num_drawn, *lm_head)

    def _matmul_s(self, M: int, N: int, K: int) -> float:
        return self._longer_s(N * K * BYTES, 2 * M * N * K)

    def _longer_s(self, num_bytes: float, flops: float) -> float:
        """Seconds of work that is shared by all GPUs."""
        bandwidth, rate = self.copy_TB_per_s * 1e12, self.matmul_TFLOP_per_s * 1e12
        return max(num_bytes / bandwidth, flops / rate) / self.tp


def seed_limit(limit: Limit) -> float:
    """Output tokens per second on workload "seed" that no engine can pass."""
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
    """What probe.py measures: the rates of `Limit`, by its names; None where it cannot run.

    In a process of its own, so that this one holds nothing of the GPU.
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
