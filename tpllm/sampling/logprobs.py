"""Log-probabilities of tokens, and the likeliest tokens, of a vocabulary split over the ranks.

n positions, V vocab_size, Vl ids on this rank, k likeliest tokens.

For each position, ranks exchange the largest logit, the sum of probabilities, the logit and the
rank of its token, and k keys of each rank (see `token_order`). They do not exchange the logits.
"""

import math

import torch
from torch import Tensor

from tpllm.parallel.collectives import all_gather, all_reduce
from tpllm.parallel.group import TPGroup
from tpllm.sampling.thresholds import likeliest
from tpllm.sampling.token_order import UNIT, keys_of, logits_and_ids, rank_and_mass


def token_logprobs(
    scores: Tensor, token_ids: Tensor, num_likeliest: int, vocab_start: int, tp: TPGroup
) -> Tensor:
    """Return log-probabilities of the given and of the k likeliest tokens: [n, 3 + 2k] int32.

    A row holds the token's rank (1 for the likeliest; of equal logits the lower id comes first),
    then 1 + k ids, beginning with the given token, then the bits of their 1 + k float32
    log-probabilities.

    Args:
        scores: [n, Vl] float32, the model's logits as `scores_of` returns them
        token_ids: [n] int32, equal on every rank
        num_likeliest: k, at most V
    """
    local_size = scores.shape[1]
    cols = token_ids.long() - vocab_start
    inside = cols.clamp(0, local_size - 1)
    own = scores.gather(1, inside.unsqueeze(1)).squeeze(1)
    own = own.masked_fill(cols != inside, -torch.inf)
    largest, own = all_gather(torch.stack([scores.amax(dim=1), own]), tp).amax(dim=0)

    own_keys = keys_of(own, token_ids.long())
    sums = all_reduce(rank_and_mass(scores, own_keys, largest, vocab_start), tp)
    rank, mass = sums.split(1, dim=1)  # [n, 1] each
    log_sum = largest.double() + mass.squeeze(1).double().log() - math.log(UNIT)  # [n]

    likeliest, ids = logits_and_ids(_likeliest(scores, num_likeliest, vocab_start, tp))  # [n, k]
    all_ids = torch.cat([token_ids.unsqueeze(1), ids], dim=1)
    logits = torch.cat([own.unsqueeze(1), likeliest], dim=1)
    logprobs = (logits.double() - log_sum.unsqueeze(1)).float()
    return torch.cat([rank.int(), all_ids, logprobs.view(torch.int32)], dim=1)


def _likeliest(scores: Tensor, num_likeliest: int, vocab_start: int, tp: TPGroup) -> Tensor:
    """Return the keys of the likeliest tokens over all ranks, in order: [n, k] int64."""
    num_rows, local_size = scores.shape
    if num_likeliest == 0:
        return torch.empty(num_rows, 0, dtype=torch.int64, device=scores.device)
    num_local = min(num_likeliest, local_size)
    local = likeliest(scores, num_local, vocab_start)  # [n, k or Vl]
    gathered = all_gather(local, tp).transpose(0, 1).flatten(1)  # [n, tp.size * num_local]
    return gathered.topk(num_likeliest, dim=1).values
