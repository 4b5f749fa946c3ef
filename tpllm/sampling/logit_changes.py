"""Changes to single logits before sampling: biases, bans, allowed ids, bad words, penalties.

P rows of scores, V vocab_size, Vl ids on this rank, n entries, L tokens.

All functions change scores in place, as `scores_of` returns them: [P, Vl] float32, followed by a
spare column. Entries of another rank's ids, or of a row that is not in the step, are written to the
spare column.
"""

import torch
from torch import Tensor

from tpllm.sampling.token_order import with_spare_column


def add_at(scores: Tensor, slots: Tensor, cols: Tensor, values: Tensor | float) -> None:
    """Add values to single scores; -inf bans a token.

    Args:
        slots: [n] int64, rows of scores; -1 for an entry of another row
        cols: [n] int64 in 0 .. Vl - 1; a (slot, column) pair may repeat if its values are equal or
            their order does not matter
        values: [n] float32, or one value for all entries
    """
    memory = with_spare_column(scores)
    flat = _flat_indices(memory, scores.shape[1], slots, cols)
    if isinstance(values, float):
        values = torch.full(flat.shape, values, device=scores.device)
    memory.view(-1).index_add_(0, flat, values)


def keep_only(scores: Tensor, rows: Tensor, slots: Tensor, cols: Tensor) -> None:
    """Set the scores of `rows` [m] int64 to -inf, except at the entries (as in `add_at`)."""
    memory = with_spare_column(scores)
    flat = _flat_indices(memory, scores.shape[1], slots, cols)
    kept = memory.view(-1)[flat]
    scores[rows] = -torch.inf
    memory.view(-1)[flat] = kept


def ends_with(
    tokens: Tensor, rows: Tensor, lengths: Tensor, prompt_lengths: Tensor, words: Tensor
) -> Tensor:
    """Return whether a row's generated tokens end with a given sequence of tokens: [n] bool.

    Args:
        tokens: [R, max_len] int32, tokens of every row
        rows: [n] int64
        lengths: [n] int64, number of tokens of the row
        prompt_lengths: [n] int64, tokens of its prompt, which are not compared
        words: [n, L] int32, the token sequences, last token first, padded with -1
    """
    back = torch.arange(1, words.shape[1] + 1, device=words.device)
    positions = lengths.unsqueeze(1) - back  # [n, L]
    found = tokens[rows.unsqueeze(1), positions.clamp(min=0)]
    generated = positions >= prompt_lengths.unsqueeze(1)
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
    """Apply repetition, frequency and presence penalties, as vLLM does.

    Args:
        rows: [q] int64, the rows of scores that have penalties
        tokens: [q, L] int32, their tokens; values from `lengths` on are ignored
        lengths, prompt_lengths: [q] int64, tokens of each row, and tokens of its prompt
        penalties: [q, 3] float32: repetition (divides positive logits and multiplies the others,
            for tokens of prompt and output), frequency (times the token's count in the output),
            presence
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
    times = counts.gather(1, cols)  # [q, L] the token's count in the output

    repetition, frequency, presence = penalties.unsqueeze(2).unbind(1)  # [q, 1] each
    # every occurrence of a token writes the same new score, computed from the old one
    logits = memory[rows.unsqueeze(1), cols]
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - frequency * times
    logits = logits - presence * (times > 0)
    memory[rows.unsqueeze(1), cols] = logits


def _flat_indices(memory: Tensor, spare: int, slots: Tensor, cols: Tensor) -> Tensor:
    """Return the entries' indices in the flat memory; slot -1 gets the spare column of row 0."""
    return torch.where(slots >= 0, slots * memory.shape[1] + cols, spare)
