"""Measures decode attention over the paged cache: flash-attn 2 against our split-KV kernel.

Both read each key and value once, so the limit is memory bandwidth: the table gives TB/s of keys
and values (launch/probe.py measures the bandwidth of a copy). The kernels are replayed from a CUDA
graph, over enough different caches to exceed the L2; head_dim 128, bf16, pages of 256 tokens.

    python launch/bench_attention.py
    python launch/bench_attention.py --batches 185 --range 400 1324 --heads 16 4
    python launch/bench_attention.py --batches 184 --contexts 860 --spread 0 --long 32768
"""

import argparse
import json
from collections.abc import Callable

import torch
from flash_attn import flash_attn_with_kvcache
from probe import graph_us
from torch import Tensor

from tpllm.layers.attention.attention import AttentionBatch
from tpllm.layers.attention.paged_decode import PagedDecode
from tpllm.layers.attention.split_schedule import ContextSplit
from tpllm.layers.rotary import QKNormRope

PAGE, HEAD_DIM = 256, 128


def random_contexts(S: int, low: float, high: float) -> Tensor:
    """Sample S context lengths uniformly from a range: [S] int32."""
    torch.manual_seed(0)
    return (low + (high - low) * torch.rand(S)).int()


def measure(contexts: Tensor, num_heads: int, num_kv_heads: int, width: int, rope: bool) -> dict:
    """Return microseconds and TB/s of each kernel at contexts [S].

    Block tables have room for `width` tokens. With `rope`, our kernel also norms, rotates and
    stores the newest token; flash-attn cannot.
    """
    S, pages_each = len(contexts), -(-int(contexts.max()) // PAGE)
    num_bytes = int(contexts.sum()) * 2 * num_kv_heads * HEAD_DIM * 2
    num_caches = max(2, min(16, (1 << 30) // num_bytes))
    shape = (num_caches, 2, S * pages_each, PAGE, num_kv_heads, HEAD_DIM)
    caches = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    tables = torch.zeros(S, -(-width // PAGE), dtype=torch.int32, device="cuda")
    pages = torch.randperm(S * pages_each).int().view(S, pages_each)
    tables[:, :pages_each] = pages.cuda()
    heads = num_heads + 2 * num_kv_heads
    q = torch.randn(S, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")[:, :num_heads]
    lengths = contexts.cuda()
    schedule = torch.from_numpy(ContextSplit(num_kv_heads).schedule(contexts.numpy())).cuda()
    slots = torch.zeros_like(tables[:, 0])  # the kernel finds the newest token's slot itself
    batch = AttentionBatch(slots, S, lengths, tables, schedule, None)
    paged, scale = PagedDecode(), HEAD_DIM**-0.5
    qk_norm_rope = None
    if rope:
        weight = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        cos_sin = torch.ones(int(contexts.max()), HEAD_DIM, device="cuda")
        qk_norm_rope = QKNormRope(lengths - 1, cos_sin, (weight, weight), 1e-6)
    kernels: dict[str, Callable] = {
        "split": lambda k, v: paged.decode(q, k, v, batch, scale, qk_norm_rope)
    }
    if not rope:
        kernels["flash-attn 2"] = lambda k, v: flash_attn_with_kvcache(
            q.unsqueeze(1), k, v, cache_seqlens=lengths, block_table=tables, causal=True
        )
    row: dict = {"batch": S, "context": round(float(contexts.float().mean()))}
    for name, kernel in kernels.items():
        us = graph_us(lambda kernel=kernel: [kernel(k, v) for k, v in caches]) / num_caches
        row[name] = {"us": round(us, 1), "TB_per_s": round(num_bytes / us / 1e6, 2)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[300, 1024, 8192, 32768])
    parser.add_argument("--spread", type=float, default=0.25, help="relative spread of contexts")
    parser.add_argument("--range", type=int, nargs=2, metavar=("LOW", "HIGH"), help="of contexts")
    parser.add_argument("--long", type=int, metavar="N", help="add one context of N tokens")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("H", "K"))
    parser.add_argument("--max-len", type=int, default=40960, help="width of the block tables")
    parser.add_argument("--rope", action="store_true", help="norms, rotation and store, too")
    args = parser.parse_args()
    ranges = [((1 - args.spread) * each, (1 + args.spread) * each) for each in args.contexts]
    rows = []
    for low, high in [args.range] if args.range else ranges:
        for S in args.batches:
            if S * high > 5 << 19:  # more tokens than one GPU's cache holds
                continue
            contexts = random_contexts(S, low, high).clamp(max=args.max_len)
            if args.long:
                contexts = torch.cat([contexts, torch.tensor([args.long], dtype=torch.int32)])
            row = measure(contexts, *args.heads, args.max_len, args.rope)
            rows.append(row)
            cells = (
                f"{name} {figures['us']:8.1f} us {figures['TB_per_s']:5.2f} TB/s"
                for name, figures in row.items()
                if isinstance(figures, dict)
            )
            text = f"batch {row['batch']:4}   context {row['context']:6}   "
            print(text + "   ".join(cells), flush=True)
    print(json.dumps({"arguments": vars(args), "gpu": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
