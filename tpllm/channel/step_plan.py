"""The wire layout of a step: the plan that workers receive and the result that rank 0 returns.

A worker keeps the batch on its GPU, one *row* per running sequence: block table, sampling settings,
last token. A plan therefore carries only what changed (rows that enter, blocks added to tables) and
what to compute: for each scheduled row, the position where it starts and the number of tokens.
Decode rows come first; their input id is the row's last token, which never left the GPU. Prefill
rows follow with their token ids.

A record is a header of int64 words, then flat int32 arrays. It is complete: no earlier record is
needed to read it. All arrays of a decoded plan are views of the received bytes.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tpllm.channel.logprob_records import BLOCK_HEADER_WORDS, position_words
from tpllm.channel.row_record import records_of, row_words, words_of

VERSION = 4
_HEADER_WORDS = 8  # int64: version, step, then up to six counts

# kinds of record in a ring
STEP = 1
RESULT = 2
CONTROL = 3  # JSON, rare
MASKS = 4

# The cache block that no sequence gets: the padding rows of a CUDA graph write there.
RESERVED_BLOCK = 0


@dataclass
class StepPlan:
    """One step, as broadcast to every worker. S scheduled rows, the first `num_decode` decode."""

    step: int
    num_decode: int
    rows: np.ndarray  # [S] row index of each scheduled sequence
    starts: np.ndarray  # [S] tokens of the row already in the cache: where this step begins
    num_tokens: np.ndarray  # [S] tokens that this step computes; 1 for a decode row
    samples: np.ndarray  # [S] 1 if the row samples a token after its last one, 0 inside a prompt
    entering: np.ndarray  # [n] ROW, the records of rows that a new sequence takes over
    block_updates: np.ndarray  # [m, 2] (row * max_blocks_per_seq + index in the table, block id)
    token_ids: np.ndarray  # [sum of num_tokens of the prefill rows]
    row_lists: np.ndarray  # the lists of the entering rows, in order: see `row_record.py`

    def buffers(self) -> list[np.ndarray]:
        """Return the record's arrays in order, for `RingWriter.try_send`."""
        counts = (
            self.rows.size,
            self.num_decode,
            len(self.entering),
            len(self.block_updates),
            self.token_ids.size,
            self.row_lists.size,
        )
        header = _write_header(self.step, counts)
        arrays = (self.rows, self.starts, self.num_tokens, self.samples)
        deltas = (words_of(self.entering), self.block_updates, self.token_ids, self.row_lists)
        return [header, *arrays, *deltas]

    @classmethod
    def decode(cls, payload: np.ndarray) -> "StepPlan":
        """Read a record's payload [bytes] uint8.

        Raises:
            ValueError: another version of tpllm wrote it.
        """
        step, S, num_decode, n, m, tokens, lists = _read_header(payload)
        words = payload[_HEADER_WORDS * 8 :].view("<i4")
        sizes = [S, S, S, S, n * row_words(), m * 2, tokens, lists]
        bounds = np.cumsum([0, *sizes]).tolist()
        *of_rows, entering, updates, token_ids, row_lists = (
            words[begin:end] for begin, end in pairwise(bounds)
        )
        deltas = [records_of(entering), updates.reshape(m, 2), token_ids, row_lists]
        return cls(step, num_decode, *of_rows, *deltas)


@dataclass
class StepMasks:
    """Which tokens the masked rows of a step may sample (see `ROW`'s `is_masked`).

    This record follows the step's plan, before any later plan, and is sent even if m is 0. A masked
    row that is not among the m rows samples from all tokens; its request has ended.
    """

    step: int
    indices: np.ndarray  # [m] index of each row among the plan's scheduled rows
    words: np.ndarray  # [m, mask_words] a bit for each token id, 1 if it may be sampled

    def buffers(self) -> list[np.ndarray]:
        header = _write_header(self.step, self.words.shape)
        return [header, self.indices, self.words]

    @classmethod
    def decode(cls, payload: np.ndarray) -> "StepMasks":
        step, m, num_words, *_ = _read_header(payload)
        words = payload[_HEADER_WORDS * 8 :].view("<i4")
        return cls(step, words[:m], words[m:].reshape(m, num_words))


@dataclass
class StepResult:
    """The sampled tokens of a step, in the order of its plan's rows; rank 0 sends it."""

    step: int
    num_yielded: np.ndarray  # [S] tokens that each row yields: 0 inside a prompt
    token_ids: np.ndarray  # [sum of num_yielded]
    logprobs: np.ndarray  # blocks of the rows that report them: see `logprob_records.py`

    def buffers(self) -> list[np.ndarray]:
        counts = (self.num_yielded.size, self.token_ids.size, self.logprobs.size)
        header = _write_header(self.step, counts)
        return [header, self.num_yielded, self.token_ids, self.logprobs]

    @classmethod
    def decode(cls, payload: np.ndarray) -> "StepResult":
        step, S, tokens, logprobs, *_ = _read_header(payload)
        words = payload[_HEADER_WORDS * 8 :].view("<i4")
        end = S + tokens
        return cls(step, words[:S], words[S:end], words[end : end + logprobs])


@dataclass(frozen=True)
class PlanLimits:
    """The most that one step may carry. The scheduler obeys it, and it sets the ring's size."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_blocks_per_seq: int
    block_size: int
    vocab_size: int
    max_logprobs: int  # most likeliest tokens that a row reports

    @property
    def max_tokens_per_seq(self) -> int:
        return self.max_blocks_per_seq * self.block_size

    @property
    def max_list_words(self) -> int:
        """The most words that one request's lists may take, such as a bias for every token."""
        return 3 * self.vocab_size + 8192  # some 5,000 bad words even with a small vocabulary

    @property
    def max_row_list_words(self) -> int:
        # the largest lists of one row, and a step full of new rows with short lists
        largest = self.max_list_words + self.max_tokens_per_seq
        simple = self.max_num_seqs * 16 + self.max_num_batched_tokens
        return 32 + max(largest, simple)

    @property
    def max_block_updates(self) -> int:
        # enough for the longest single sequence and a step full of new prompts and decode rows
        prompts = self.max_num_batched_tokens // self.block_size + self.max_num_seqs
        return self.max_blocks_per_seq + prompts + self.max_num_seqs

    @property
    def plan_bytes(self) -> int:
        rows = self.max_num_seqs * (4 + row_words())
        words = rows + 2 * self.max_block_updates + self.max_num_batched_tokens
        words += self.max_row_list_words
        return _HEADER_WORDS * 8 + words * 4

    @property
    def mask_words(self) -> int:
        """The number of words of one mask."""
        return -(-self.vocab_size // 32)

    @property
    def masks_bytes(self) -> int:
        return _HEADER_WORDS * 8 + self.max_num_seqs * (1 + self.mask_words) * 4

    @property
    def result_bytes(self) -> int:
        # a row may report log-probabilities of its new token and of a chunk of its prompt
        logprobs = self.max_num_seqs * (2 * BLOCK_HEADER_WORDS + position_words(self.max_logprobs))
        logprobs += self.max_num_batched_tokens * position_words(self.max_logprobs)
        return _HEADER_WORDS * 8 + (2 * self.max_num_seqs + logprobs) * 4


def _write_header(step: int, counts: tuple[int, ...]) -> np.ndarray:
    header = np.zeros(_HEADER_WORDS, dtype="<i8")
    header[: 2 + len(counts)] = (VERSION, step, *counts)
    return header


def _read_header(payload: np.ndarray) -> list[int]:
    """Return the step and the counts after it; unused counts are zero."""
    words: list[int] = payload[: _HEADER_WORDS * 8].view("<i8").tolist()
    version = words.pop(0)
    if version != VERSION:
        raise ValueError(
            f"a step record has version {version} and this process reads version {VERSION}; "
            "run the same tpllm in the coordinator and the workers"
        )
    return words
