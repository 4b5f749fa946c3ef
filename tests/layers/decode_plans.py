"""Plans of decode attention for tests."""

import numpy as np
import torch
from torch import Tensor

from tpllm.layers.decode_parts import DecodeSplit


def plan_of(context_lens: list[int], num_kv_heads: int) -> Tensor:
    """On the CPU: [P, PART_WORDS] int32."""
    return torch.from_numpy(DecodeSplit(num_kv_heads).plan(np.array(context_lens, dtype=np.int32)))
