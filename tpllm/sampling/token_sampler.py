"""From the logits of a step to its sampled tokens and the requested log-probabilities.

S sampled rows, P of them with changed logits, V vocab_size, Vl ids on this rank.

Each row is sampled once. In most steps no row has options that change its logits, and `sample`, a
CUDA graph behind the forward's, samples all rows by temperature. Otherwise `sample_changed` lets
the processors change float32 copies of some rows' logits first; the other rows have no extra cost.
Masks may arrive while the device computes the logits. The noise depends on (seed, position, id)
only, so a row's token does not depend on the other rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tpllm.channel.logprob_records import LogprobBlock
from tpllm.channel.row_record import read_tokens
from tpllm.channel.step_plan import StepMasks
from tpllm.parallel.group import TPGroup
from tpllm.sampling.logprobs import token_logprobs
from tpllm.sampling.processors import PROCESSORS, ChangedRows
from tpllm.sampling.row_table import RowTable, SampledRows, upload
from tpllm.sampling.sampler import Subset, best_over_ranks, local_candidates, sample
from tpllm.sampling.token_masks import MASK_BITS
from tpllm.sampling.token_order import scores_of

# Float32 scores that are made at once, 256 MiB; more rows are processed in pieces.
MAX_ELEMENTS = 1 << 26


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
        on_device: the same rows, on the device
    """

    step: int
    indices: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    on_device: SampledRows


class TokenSampler:
    """Samples tokens on one rank's slice of the vocabulary.

    Every rank calls the same methods with the same rows, so all ranks run the same collectives.

    Args:
        table: what the rows ask for; this class writes sampled tokens to it
        vocab_start, vocab_size: id of the slice's first column, and V
        receive_masks: waits for the masks of a step
    """

    def __init__(
        self,
        table: RowTable,
        vocab_start: int,
        vocab_size: int,
        tp: TPGroup,
        receive_masks: Callable[[int], StepMasks],
    ) -> None:
        self._table = table
        self._vocab_start = vocab_start
        self._vocab_size = vocab_size
        self._tp = tp
        self._receive_masks = receive_masks

    def sample(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """Sample tokens [S] int32 by temperature alone.

        Reads no host data, so a CUDA graph can capture it.

        Args:
            logits: [S, Vl]
        """
        return sample(logits, rows, self._vocab_start, self._vocab_size, self._tp)

    def sample_changed(self, logits: Tensor, to_sample: RowsToSample) -> Tensor | None:
        """Sample tokens [S] int32 as the rows' options ask; None if none changes the logits.

        Args:
            logits: [S, Vl], the model's logits, which do not change
        """
        records = self._table.records[to_sample.rows]
        asks = np.array([each.asks(records) for each in PROCESSORS])  # [processors, S]
        changes = asks.any(axis=0)
        if not changes.any():
            return None
        rows, vocab = to_sample.on_device, (self._vocab_start, self._vocab_size)
        candidates = None
        if not changes.all():
            where = self._upload(np.flatnonzero(~changes))
            candidates = local_candidates(logits, rows, *vocab, Subset(where))
        masks = self._wait_for_masks(to_sample) if records["is_masked"].any() else {}
        changed, size = np.flatnonzero(changes), max(1, MAX_ELEMENTS // logits.shape[1])
        for piece in np.split(changed, range(size, len(changed), size)):
            where = self._upload(piece)
            scores = scores_of(logits, *vocab, where)  # [P, Vl]
            changed_rows = ChangedRows(
                scores,
                records[piece],
                to_sample.positions[piece],
                {p: masks[i] for p, i in enumerate(piece.tolist()) if i in masks},
                rows.at(where),
                self._table,
                self._vocab_start,
                self._tp,
            )
            for processor, of_rows in zip(PROCESSORS, asks[:, piece], strict=True):
                if of_rows.any():
                    processor.apply(changed_rows, np.flatnonzero(of_rows))
            subset = Subset(where, is_compact=True, candidates=candidates)
            candidates = local_candidates(scores, rows, *vocab, subset)
        assert candidates is not None
        return best_over_ranks(candidates, self._tp)

    def finish(self, logits: Tensor, tokens: Tensor, to_sample: RowsToSample) -> StepOutput:
        """Note the sampled tokens for the rows that read them; add requested log-probabilities.

        Args:
            logits: [S, Vl], the model's logits
            tokens: [S], as sampled
        """
        output = StepOutput(tokens)
        records = self._table.records[to_sample.rows]
        reading = np.flatnonzero(read_tokens(records))
        if reading.size:
            where = self._upload(reading)
            rows = to_sample.on_device.at(where)
            self._table.tokens[rows.rows, rows.positions] = tokens[where]
        reporting = np.flatnonzero(records["num_logprobs"] >= 0)
        if reporting.size:
            where = self._upload(reporting)
            nums = records["num_logprobs"][reporting].tolist()
            words = self.logprob_words(
                lambda begin, end: logits[where[begin:end]], tokens[where], max(nums)
            )
            places = zip(
                to_sample.indices[reporting].tolist(),
                to_sample.positions[reporting].tolist(),
                nums,
                strict=True,
            )
            blocks = [(index, position, 1, k) for index, position, k in places]
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
        n, local_size = token_ids.shape[0], self._table.local_vocab_size
        size = max(1, MAX_ELEMENTS // (2 * local_size))  # twice, for their int64 keys
        words = []
        for begin in range(0, n, size):
            end = min(n, begin + size)
            scores = scores_of(logits_of(begin, end), self._vocab_start, self._vocab_size)
            ids = token_ids[begin:end]
            words.append(token_logprobs(scores, ids, num_likeliest, self._vocab_start, self._tp))
        return torch.cat(words)

    def _wait_for_masks(self, to_sample: RowsToSample) -> dict[int, np.ndarray]:
        """Return mask words [w] int32 that cover this rank's slice, by index of the sampled row."""
        masks = self._receive_masks(to_sample.step)
        first = self._vocab_start // MASK_BITS
        last = -(-(self._vocab_start + self._table.local_vocab_size) // MASK_BITS)
        places = {index: i for i, index in enumerate(to_sample.indices.tolist())}
        words = masks.words[:, first:last]
        return {
            places[index]: row for index, row in zip(masks.indices.tolist(), words, strict=True)
        }

    def _upload(self, indices: np.ndarray) -> Tensor:
        """Copy indices to the device as int64."""
        return upload(indices.astype(np.int64), self._tp.device)
