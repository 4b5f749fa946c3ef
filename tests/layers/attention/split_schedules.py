"""Split schedules of decode attention for tests."""

import numpy as np
import torch
from torch import Tensor

from tpllm.layers.attention.split_schedule import (
    BEGIN,
    CONTEXT_LEN,
    COUNT,
    END,
    INDEX,
    SCRATCH,
    SEQ,
    SPLIT_GRANULARITY,
    ContextSplit,
)


def schedule_of(context_lens: list[int], num_kv_heads: int) -> Tensor:
    """Return a split schedule on the CPU: [P, SPLIT_WORDS] int32."""
    return torch.from_numpy(
        ContextSplit(num_kv_heads).schedule(np.array(context_lens, dtype=np.int32))
    )


def assert_every_token_is_in_one_split(splits: np.ndarray, context_lens: list[int]) -> None:
    """Check the used rows of a schedule."""
    assert not (splits[:, BEGIN] % SPLIT_GRANULARITY).any()
    for seq, context_len in enumerate(context_lens):
        ours = splits[splits[:, SEQ] == seq]
        ours = ours[np.argsort(ours[:, INDEX])]
        assert ours[:, INDEX].tolist() == list(range(len(ours)))
        assert (ours[:, COUNT] == len(ours)).all()
        assert (ours[:, CONTEXT_LEN] == context_len).all()
        bounds = [0, *ours[:, END].tolist()]
        assert ours[:, BEGIN].tolist() == bounds[:-1]
        assert bounds[-1] == context_len
        assert len(set(ours[:, SCRATCH].tolist())) <= 1  # the entry of its first split
