"""Assigns the log-probabilities in a step's result to its sequences."""

import numpy as np

from tpllm.channel.logprob_records import LogprobBlock, read_blocks
from tpllm.engine.request import Sequence, TokenLogprobs


def take_logprobs(seqs: list[Sequence], words: np.ndarray) -> dict[int, list[TokenLogprobs]]:
    """Return the log-probabilities of new tokens by row index; store those of prompt tokens.

    Args:
        seqs: the step's sequences, in the order of its rows
        words: `logprobs` of the step's result
    """
    new: dict[int, list[TokenLogprobs]] = {}
    for block in read_blocks(words):
        seq = seqs[block.index]
        if block.first_position >= seq.num_prompt_tokens:
            new[block.index] = _token_logprobs(block)
        elif seq.prompt_logprobs is not None:
            seq.prompt_logprobs.put(block)
    return new


def _token_logprobs(block: LogprobBlock) -> list[TokenLogprobs]:
    likeliest = list(range(1, block.token_ids.shape[1]))
    return [
        TokenLogprobs(ids, logprobs, [rank, *likeliest])
        for ids, logprobs, rank in zip(
            block.token_ids.tolist(), block.logprobs.tolist(), block.ranks.tolist(), strict=True
        )
    ]
