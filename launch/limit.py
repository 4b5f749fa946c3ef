"""What the hardware allows on workload "seed": output tokens per second that no engine can pass.

Prompts are prefilled once, then all sequences decode in lockstep; every matmul and every attention
takes the longer of its bytes at the memory's speed and its operations at the matrix units'; on
several GPUs two all-reduces a layer take 5 us each and their bytes the link's time; nothing else
costs anything.

    python launch/limit.py --model launch/configs/Qwen3-8B --tp 2
"""

import argparse
from pathlib import Path

from tpllm.cli.bench.workloads import seed_workload
from tpllm.model_config import ModelConfig

ALL_REDUCE_S = 5e-6
BYTES = 2  # of an element, in half precision


def seed_limit(
    config: ModelConfig,
    tp: int,
    copy_TB_per_s: float,
    matmul_TFLOP_per_s: float,
    link_GB_per_s: float,
) -> float:
    """Output tokens per second on `tp` GPUs of these rates (see probe.py)."""
    E, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer_shapes = [((H + 2 * K) * D, E), (E, H * D), (2 * I, E), (E, I)]
    bandwidth, flops = copy_TB_per_s * 1e12, matmul_TFLOP_per_s * 1e12

    def matmul_s(M: int, N: int, K: int) -> float:
        return max(N * K * BYTES / bandwidth, 2 * M * N * K / flops) / tp

    def step_s(num_tokens: int, num_drawn: int) -> float:
        """Everything but attention."""
        matmuls = L * sum(matmul_s(num_tokens, *shape) for shape in layer_shapes)
        sums = 2 * L * (ALL_REDUCE_S + num_tokens * E * BYTES / (link_GB_per_s * 1e9))
        return matmuls + matmul_s(num_drawn, config.vocab_size, E) + (sums if tp > 1 else 0.0)

    def attention_s(num_keys: int, num_pairs: float) -> float:
        """Of all layers: `num_keys` keys and values read, `num_pairs` of query and key."""
        return L / tp * max(num_keys * 2 * K * D * BYTES / bandwidth, 4 * num_pairs * H * D / flops)

    prompts, params = seed_workload(config.vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    outputs = [each.max_tokens or 0 for each in params]
    seconds = step_s(sum(lengths), len(lengths))
    seconds += attention_s(sum(lengths), sum(length**2 / 2 for length in lengths))
    for step in range(1, max(outputs)):  # the first token comes from the prompt
        running = zip(lengths, outputs, strict=True)
        contexts = [length + step for length, output in running if output > step]
        seconds += step_s(len(contexts), len(contexts))
        seconds += attention_s(sum(contexts), sum(contexts))
    return sum(outputs) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="number of GPUs")
    parser.add_argument("--copy", type=float, default=4.3, help="TB/s (default: an H200's)")
    parser.add_argument("--matmul", type=float, default=790, help="TFLOP/s in bf16")
    parser.add_argument("--link", type=float, default=400, help="GB/s between two GPUs")
    args = parser.parse_args()
    config = ModelConfig.from_folder(args.model)
    print(f"{seed_limit(config, args.tp, args.copy, args.matmul, args.link):.0f} output tokens/s")


if __name__ == "__main__":
    main()
