"""From the logits of a step to its sampled tokens and the requested log-probabilities.

S sampled rows, P of them with changed logits, V vocab_size, Vl ids on this rank.

All rows are first sampled from the model's logits, in the CUDA graph if there is one. Rows whose
options change the logits, or that have masks, are sampled again from a float32 copy of their
logits; the other rows have no extra cost. Masks may arrive while the device computes the logits.
The noise depends on (seed, position, id) only, so a row's token does not depend on the other rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.logprob_records import LogprobBlock
from tpllm.channel.row_options import RowOptions
from tpllm.channel.step_plan import StepMasks
from tpllm.parallel.group import TPGroup
from tpllm.sampling.logit_changes import add_at, ends_with, keep_only, penalize
from tpllm.sampling.logprobs import token_logprobs
from tpllm.sampling.option_table import OptionTable, RowLists, upload
from tpllm.sampling.sampler import SamplingBatch, sample
from tpllm.sampling.thresholds import Truncation
from tpllm.sampling.token_masks import MASK_BITS, keep_masked
from tpllm.sampling.token_order import scores_of
from tpllm.sampling.truncation import truncate

# Float32 scores that are made at once, 256 MiB; more rows are processed in pieces.
MAX_ELEMENTS = 1 << 26
# Tokens of rows with penalties that are processed at once, at about 30 bytes each.
MAX_TOKENS = 1 << 22


@dataclass
class LogprobWords:
    """Log-probabilities of a step's positions on the device, and the rows they belong to.

    Attributes:
        words: [n, position_words(k)] int32, with the largest k that one of these rows requests
        blocks: (index of the row in the plan, first position, number of positions, k of the row)
            of each row; their positions are the n in order
    """

    words: Tensor
    blocks: list[tuple[int, int, int, int]]

    def to_records(self, words: np.ndarray) -> list[np.ndarray]:
        """Return the records for the step's result, from `words` copied to the host."""
        records, begin = [], 0
        for index, first_position, n, k in self.blocks:
            block = LogprobBlock.from_words(index, first_position, words[begin : begin + n], k)
            records.append(block.record())
            begin += n
        return records


@dataclass
class StepOutput:
    """What a step returns: sampled tokens [S] int32, and log-probabilities."""

    tokens: Tensor
    logprobs: list[LogprobWords] = field(default_factory=list)


@dataclass
class RowsToSample:
    """The S rows of a step that are sampled.

    Attributes:
        step: the step's number
        indices: [S] index of each row in the plan, on the host
        rows: [S], on the host
        positions: [S] position of each sampled token, on the host
        batch: sampling settings of the same rows, on the device
    """

    step: int
    indices: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    batch: SamplingBatch


class TokenSampler:
    """Samples tokens on one rank's slice of the vocabulary.

    Args:
        options: options of the rows; this class writes sampled tokens to it
        vocab_start, vocab_size: id of the slice's first column, and V
        receive_masks: waits for the masks of a step
    """

    def __init__(
        self,
        options: OptionTable,
        vocab_start: int,
        vocab_size: int,
        tp: TPGroup,
        receive_masks: Callable[[int], StepMasks],
    ) -> None:
        self._options = options
        self._vocab_start = vocab_start
        self._vocab_size = vocab_size
        self._tp = tp
        self._receive_masks = receive_masks

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Sample tokens [S] int32 by temperature alone.

        Reads no host data, so a CUDA graph can capture it.

        Args:
            logits: [S, Vl]
        """
        return sample(logits, batch, self._vocab_start, self._vocab_size, self._tp)

    def finish(self, logits: Tensor, tokens: Tensor, to_sample: RowsToSample) -> StepOutput:
        """Apply the rows' options to what `sample` returned; changes `tokens` in place.

        Every rank calls this with the same rows, so all ranks run the same collectives.

        Args:
            logits: [S, Vl], the model's logits
            tokens: [S], as `sample` returned them
        """
        output = StepOutput(tokens)
        with_options = [
            (i, options)
            for i, row in enumerate(to_sample.rows.tolist())
            if (options := self._options.of(row)) is not None
        ]
        masks = {}  # by index in `tokens`
        if any(options.is_masked for _, options in with_options):
            masks = self._wait_for_masks(to_sample)
        changed = [
            (i, options) for i, options in with_options if options.changes_logits or i in masks
        ]
        size = max(1, MAX_ELEMENTS // logits.shape[1])
        for begin in range(0, len(changed), size):
            self._resample(logits, tokens, to_sample, changed[begin : begin + size], masks)
        with_tokens = [i for i, options in with_options if options.reads_tokens]
        if with_tokens:
            where = self._upload(with_tokens)
            rows = self._upload(to_sample.rows[with_tokens])
            positions = to_sample.batch.positions[where]
            self._options.tokens[rows, positions.long()] = tokens[where]
        with_logprobs = [
            (i, each.num_logprobs) for i, each in with_options if each.num_logprobs >= 0
        ]
        if with_logprobs:
            where = self._upload([i for i, _ in with_logprobs])
            words = self.logprob_words(
                lambda begin, end: logits[where[begin:end]],
                tokens[where],
                max(k for _, k in with_logprobs),
            )
            blocks = [
                (int(to_sample.indices[i]), int(to_sample.positions[i]), 1, k)
                for i, k in with_logprobs
            ]
            output.logprobs.append(LogprobWords(words, blocks))
        return output

    def logprob_words(
        self, logits_of: Callable[[int, int], Tensor], token_ids: Tensor, num_likeliest: int
    ) -> Tensor:
        """Return log-probabilities of tokens [n] and of the likeliest ones: see `token_logprobs`.

        Args:
            logits_of: returns the logits [end - begin, Vl] of positions begin .. end; it is called
                for pieces of the positions to bound memory
        """
        n, local_size = token_ids.shape[0], self._options.local_vocab_size
        size = max(1, MAX_ELEMENTS // (2 * local_size))  # twice, for their int64 keys
        words = []
        for begin in range(0, n, size):
            end = min(n, begin + size)
            scores = scores_of(logits_of(begin, end), self._vocab_start, self._vocab_size)
            ids = token_ids[begin:end]
            words.append(token_logprobs(scores, ids, num_likeliest, self._vocab_start, self._tp))
        return torch.cat(words)

    # ---- rows whose logits change ------------------------------------------------------------

    def _wait_for_masks(self, to_sample: RowsToSample) -> dict[int, np.ndarray]:
        """Return mask words [w] int32 that cover this rank's slice, by index of the sampled row."""
        masks = self._receive_masks(to_sample.step)
        first = self._vocab_start // MASK_BITS
        last = -(-(self._vocab_start + self._options.local_vocab_size) // MASK_BITS)
        places = {index: i for i, index in enumerate(to_sample.indices.tolist())}
        words = masks.words[:, first:last]
        return {
            places[index]: row for index, row in zip(masks.indices.tolist(), words, strict=True)
        }

    def _resample(
        self,
        logits: Tensor,
        tokens: Tensor,
        to_sample: RowsToSample,
        changed: list[tuple[int, RowOptions]],
        masks: dict[int, np.ndarray],
    ) -> None:
        """Sample the rows of `changed` from their changed logits."""
        indices = [i for i, _ in changed]
        where, rows = self._upload(indices), self._upload(to_sample.rows[indices])
        batch = SamplingBatch(**{name: x[where] for name, x in vars(to_sample.batch).items()})
        positions = batch.positions.long()
        scores = scores_of(logits, self._vocab_start, self._vocab_size, where)  # [P, Vl]
        masked = [p for p, i in enumerate(indices) if i in masks]
        if masked:
            words = upload(np.stack([masks[indices[p]] for p in masked]), self._tp.device)
            keep_masked(scores, self._upload(masked), words, self._vocab_start % MASK_BITS)
        if self._options.lists is not None:
            with_allowed_ids = [p for p, (_, each) in enumerate(changed) if each.allowed_ids.size]
            self._apply_lists(self._options.lists, scores, rows, positions, batch, with_allowed_ids)
        penalized = [p for p, (_, each) in enumerate(changed) if each.has_penalties]
        if penalized:
            longest = int(to_sample.positions[[indices[p] for p in penalized]].max())
            for here in self._upload(penalized).split(max(1, MAX_TOKENS // longest)):
                penalize(
                    scores,
                    here,
                    self._options.tokens[rows[here], :longest],
                    positions[here],
                    self._options.prompt_lengths(rows[here]),
                    self._options.penalties(rows[here]),
                    self._vocab_start,
                )
        if any(each.truncates for _, each in changed):
            top_ks, top_ps, min_ps = self._options.truncations(rows)
            truncation = Truncation(
                batch.temperatures,
                top_ks if any(each.top_k > 0 for _, each in changed) else None,
                top_ps if any(each.top_p < 1 for _, each in changed) else None,
                min_ps if any(each.min_p > 0 for _, each in changed) else None,
            )
            truncate(scores, truncation, self._vocab_start, self._tp)
        tokens[where] = self.sample(scores, batch)

    def _apply_lists(
        self,
        lists: RowLists,
        scores: Tensor,
        rows: Tensor,
        positions: Tensor,
        batch: SamplingBatch,
        with_allowed_ids: list[int],
    ) -> None:
        """Apply allowed_token_ids, bad_words, min_tokens and logit_bias, in vLLM's order.

        Args:
            rows, positions: [P] int64, of the rows of `scores`
            with_allowed_ids: indices of the rows that have allowed ids
        """
        num_rows = self._options.tokens.shape[0]
        slots = rows.new_full((num_rows,), -1)
        slots[rows] = torch.arange(len(rows), device=rows.device)
        if with_allowed_ids:
            keep_only(
                scores, self._upload(with_allowed_ids), slots[lists.allowed[0]], lists.allowed[1]
            )
        if lists.words.shape[0]:
            word_rows, last = lists.last_of_words
            word_slots = slots[word_rows]
            found = ends_with(
                self._options.tokens,
                word_rows,
                positions[word_slots],  # of another row if the word's row is not in the step
                self._options.prompt_lengths(word_rows),
                lists.words,
            )
            add_at(scores, word_slots.masked_fill(~found, -1), last, -torch.inf)
        if lists.banned[0].numel():
            banned_slots = slots[lists.banned[0]]
            early = (batch.positions < batch.min_positions)[banned_slots]
            add_at(scores, banned_slots.masked_fill(~early, -1), lists.banned[1], -torch.inf)
        if lists.bias_values.numel():
            add_at(scores, slots[lists.bias[0]], lists.bias[1], lists.bias_values)

    def _upload(self, indices: np.ndarray | list[int]) -> Tensor:
        """Copy indices to the device as int64."""
        return upload(np.array(indices, dtype=np.int64), self._tp.device)
