"""Measures decode attention over the paged cache: flash-attn 2 against our split kernel.

Both read each key and value once, so the limit is memory bandwidth: the table gives TB/s of keys
and values (launch/probe.py measures what a copy reaches). Replayed from a CUDA graph over as many
different caches as hold more than the L2 does; head_dim 128, bf16, pages of 256 tokens.

    python launch/bench_attention.py
"""

import argparse
import json
from collections.abc import Callable

import torch
from flash_attn import flash_attn_with_kvcache
from probe import graph_us

from tpllm.layers.decode_parts import DecodeSplit
from tpllm.layers.paged_decode import PagedDecode

PAGE, HEAD_DIM = 256, 128


def measure(S: int, context: int, num_heads: int, num_kv_heads: int, max_len: int) -> dict:
    """Microseconds and TB/s of each kernel at a batch of S contexts between 3/4 and 5/4 of one."""
    torch.manual_seed(0)
    contexts = (context * (0.75 + 0.5 * torch.rand(S))).int().clamp(max=max_len)
    contexts = contexts.sort(descending=True).values
    pages_each = -(-int(contexts.max()) // PAGE)
    num_bytes = int(contexts.sum()) * 2 * num_kv_heads * HEAD_DIM * 2
    num_caches = max(1, min(16, (256 << 20) // num_bytes))
    shape = (num_caches, 2, S * pages_each, PAGE, num_kv_heads, HEAD_DIM)
    caches = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    tables = torch.zeros(S, max_len // PAGE, dtype=torch.int32, device="cuda")
    pages = torch.randperm(S * pages_each).int().view(S, pages_each)
    tables[:, :pages_each] = pages.cuda()
    q = torch.randn(S, num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    lengths = contexts.cuda()
    split = PagedDecode()
    plan = torch.from_numpy(DecodeSplit(num_kv_heads).plan(contexts.numpy())).cuda()
    scale = HEAD_DIM**-0.5
    kernels: dict[str, Callable] = {
        "flash-attn 2": lambda k, v: flash_attn_with_kvcache(
            q.unsqueeze(1), k, v, cache_seqlens=lengths, block_table=tables, causal=True
        ),
        "split": lambda k, v: split(q, k, v, tables, plan, scale),
    }
    row: dict = {"batch": S, "context": context}
    for name, kernel in kernels.items():
        us = graph_us(lambda kernel=kernel: [kernel(k, v) for k, v in caches]) / num_caches
        row[name] = {"us": round(us, 1), "TB_per_s": round(num_bytes / us / 1e6, 2)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[300, 1024, 8192, 32768])
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("H", "K"))
    parser.add_argument("--max-len", type=int, default=40960, help="width of the block tables")
    args = parser.parse_args()
    rows = []
    for context in args.contexts:
        for S in args.batches:
            if S * context > 1 << 21:  # beyond what one GPU's cache holds
                continue
            row = measure(S, context, *args.heads, args.max_len)
            rows.append(row)
            cells = (
                f"{name} {row[name]['us']:8.1f} us {row[name]['TB_per_s']:5.2f} TB/s"
                for name in ("flash-attn 2", "split")
            )
            print(f"context {context:6} batch {S:4}   " + "   ".join(cells), flush=True)
    print(json.dumps({"arguments": vars(args), "gpu": torch.cuda.get_device_name(), "rows": rows}))


if __name__ == "__main__":
    main()
