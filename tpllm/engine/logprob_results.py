"""The log-probabilities in a step's result, handed to the sequences that they are of."""

import numpy as np

from tpllm.channel.logprob_records import LogprobBlock, read_blocks
from tpllm.engine.request import Sequence, TokenLogprobs


def take_logprobs(seqs: list[Sequence], words: np.ndarray) -> dict[int, list[TokenLogprobs]]:
    """Log-probabilities of new tokens, by the index of their row; those of prompts are put away.

    Args:
        seqs: the step's, in the order of its rows
        words: `logprobs` of its result
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
