"""Changes to single logits before a draw: biases, bans, allowed ids, bad words, penalties.

P rows of scores, V vocab_size, Vl ids on this rank, n entries, L tokens.

Everything works in place on scores as `scores_of` gives them, [P, Vl] float32 with a spare column
behind: what concerns another rank's ids, or a row that is not part of the step, goes there.
"""

import torch
from torch import Tensor

from tpllm.sampling.token_order import with_spare_column


def add_at(scores: Tensor, slots: Tensor, cols: Tensor, values: Tensor | float) -> None:
    """Add to single scores; -inf bans a token.

    Args:
        slots: [n] int64, rows of scores; -1 where the entry concerns none of them
        cols: [n] int64 in 0 .. Vl - 1; a (slot, column) pair may come more than once if its values
            are equal or their order does not matter
        values: [n] float32, or one for all
    """
    memory = with_spare_column(scores)
    flat = _flat_indices(memory, scores.shape[1], slots, cols)
    if isinstance(values, float):
        values = torch.full(flat.shape, values, device=scores.device)
    memory.view(-1).index_add_(0, flat, values)


def keep_only(scores: Tensor, rows: Tensor, slots: Tensor, cols: Tensor) -> None:
    """Set every score of `rows` [m] int64 to -inf but those of the entries (as in `add_at`)."""
    memory = with_spare_column(scores)
    flat = _flat_indices(memory, scores.shape[1], slots, cols)
    kept = memory.view(-1)[flat]
    scores[rows] = -torch.inf
    memory.view(-1)[flat] = kept


def ends_with(tokens: Tensor, rows: Tensor, ends: Tensor, floors: Tensor, words: Tensor) -> Tensor:
    """Whether a row's generated tokens end with a sequence: [n] bool.

    Args:
        tokens: [R, max_len] int32, tokens of every row
        rows: [n] int64
        ends: [n] int64, how many tokens the row has
        floors: [n] int64, how many of these are its prompt, which does not count
        words: [n, L] int32, the sequences from their last token backwards, padded with -1
    """
    back = torch.arange(1, words.shape[1] + 1, device=words.device)
    positions = ends.unsqueeze(1) - back  # [n, L]
    found = tokens[rows.unsqueeze(1), positions.clamp(min=0)]
    generated = positions >= floors.unsqueeze(1)
    return (((found == words) & generated) | (words < 0)).all(dim=1)


def penalize(
    scores: Tensor,
    rows: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    penalties: Tensor,
    vocab_start: int,
) -> None:
    """Repetition, frequency and presence penalties, as vLLM applies them.

    Args:
        rows: [q] int64, the rows of scores that have penalties
        tokens: [q, L] int32, their tokens, those from `lengths` on without meaning
        lengths, prompt_lengths: [q] int64, tokens of each row, and how many of these its prompt has
        penalties: [q, 3] float32: repetition (over prompt and output: divides positive logits and
            multiplies the others), frequency (times how often the output has the token), presence
    """
    local_size = scores.shape[1]
    memory = with_spare_column(scores)
    positions = torch.arange(tokens.shape[1], device=scores.device)  # [L]
    cols = tokens.long() - vocab_start
    foreign = (cols < 0) | (cols >= local_size) | (positions >= lengths.unsqueeze(1))
    cols = cols.masked_fill(foreign, local_size)  # [q, L]
    is_output = positions >= prompt_lengths.unsqueeze(1)
    counts = torch.zeros(len(rows), local_size + 1, dtype=torch.int32, device=scores.device)
    counts.scatter_add_(1, cols, is_output.int())
    times = counts.gather(1, cols)  # [q, L] how often the output has each token

    repetition, frequency, presence = penalties.unsqueeze(2).unbind(1)  # [q, 1] each
    # every place of a token computes the same new score from the old one
    logits = memory[rows.unsqueeze(1), cols]
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - frequency * times
    logits = logits - presence * (times > 0)
    memory[rows.unsqueeze(1), cols] = logits


def _flat_indices(memory: Tensor, spare: int, slots: Tensor, cols: Tensor) -> Tensor:
    """Where the entries lie in the flat memory; the spare column of row 0 for those of no row."""
    return torch.where(slots >= 0, slots * memory.shape[1] + cols, spare)
