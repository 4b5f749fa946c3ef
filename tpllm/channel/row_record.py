"""What a row asks of sampling: one record of fixed fields, followed by lists of any length.

`ROW` is the only layout. The coordinator fills a record when a sequence is added, a plan carries
the records of the rows that enter, the workers upload their words as they are (`RowTable`), and
kernels read a field at its `column`. So a new option is a field here, its check in
`SamplingParams`, and what reads it: see `sampling/processors.py`.
"""

from functools import cache

import numpy as np

# End tokens that fit in a record, where excluding them takes the sampling kernel no time.
MAX_STOP_IDS = 16

# Lists in the order in which they follow a record. Of n bad words, `bad_word_ids` holds the tokens
# joined, and `bad_word_ends` [n] the index at which each word ends. `tokens` are those of the
# sequence so far, sent only if an option reads them.
LISTS = {
    "bias_ids": "<i4",
    "bias_values": "<f4",  # added to the logits of bias_ids
    "banned_ids": "<i4",  # not sampled before min_position
    "allowed_ids": "<i4",  # the only ids that are sampled, unless empty
    "bad_word_ids": "<i4",
    "bad_word_ends": "<i4",
    "tokens": "<i4",
}
Lists = dict[str, np.ndarray]

ROW = np.dtype(
    [
        # all that sampling by temperature alone needs
        ("row", "<i4"),
        ("num_prompt_tokens", "<i4"),
        ("temperature", "<f4"),  # 0 for greedy sampling
        ("seed", "<u8"),
        ("min_position", "<i4"),  # before this position the stop ids are not sampled
        ("stop_ids", "<i4", MAX_STOP_IDS),  # padded with -1
        # options, which change nothing at their defaults
        ("top_k", "<i4"),  # 0 for all tokens
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("repetition_penalty", "<f4"),
        ("frequency_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        # the likeliest tokens to report besides the actual one; -1 for no report
        ("num_logprobs", "<i4"),
        ("num_prompt_logprobs", "<i4"),
        ("is_masked", "<i4"),  # 1 if sampling waits for a mask: see `StepMasks`
        ("list_sizes", "<i4", len(LISTS)),
    ]
)
DEFAULTS = {
    "stop_ids": -1,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_logprobs": -1,
    "num_prompt_logprobs": -1,
}
TRUNCATIONS = ("top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
TOKEN_READERS = (*PENALTIES, "num_prompt_logprobs")  # and bad words


def new_records(num_rows: int) -> np.ndarray:
    """Return records [num_rows] of greedy rows without options."""
    return _default_record(ROW).repeat(num_rows)


@cache
def _default_record(dtype: np.dtype) -> np.ndarray:
    record = np.zeros(1, dtype)
    for name, value in DEFAULTS.items():
        record[name] = value
    return record


def row_words() -> int:
    """Return the number of int32 words of a record."""
    return ROW.itemsize // 4


def field(name: str) -> tuple[int, np.dtype]:
    """Return the index of a field's first word in a record, and the field's type."""
    assert ROW.fields is not None
    dtype, offset = ROW.fields[name][:2]
    return offset // 4, dtype


def column(name: str) -> int:
    """Return the index of a field's first word in a record."""
    return field(name)[0]


def words_of(records: np.ndarray) -> np.ndarray:
    """Return records [n] as words: a view [n, row_words()] int32."""
    return np.ascontiguousarray(records).view(np.int32).reshape(len(records), row_words())


def records_of(words: np.ndarray) -> np.ndarray:
    """Return the records [n] that flat int32 words hold: a view."""
    return words.view(ROW)


def list_sizes(records: np.ndarray, name: str) -> np.ndarray:
    """Return the lengths of one list of each record: [n] int32."""
    sizes: np.ndarray = records["list_sizes"][..., list(LISTS).index(name)]
    return sizes


def differ(records: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Return which records have another value than the default in one of these fields: [n] bool."""
    changed: np.ndarray = records[names[0]] != DEFAULTS.get(names[0], 0)
    for name in names[1:]:
        changed = changed | (records[name] != DEFAULTS.get(name, 0))
    return changed


def have_options(records: np.ndarray) -> np.ndarray:
    """Return which records ask for more than temperature, seed and stop ids: [n] bool."""
    first = column("top_k")
    plain = words_of(new_records(1))[:, first:]
    result: np.ndarray = (words_of(records)[:, first:] != plain).any(axis=1)
    return result


def read_tokens(records: np.ndarray) -> np.ndarray:
    """Return which records have options that read the sequence's tokens: [n] bool."""
    result = differ(records, TOKEN_READERS)
    result |= list_sizes(records, "bad_word_ids") > 0
    return result


def split_lists(records: np.ndarray, words: np.ndarray) -> list[Lists]:
    """Return the lists of each record, as views of their joined `words` [m] int32."""
    bounds = np.cumsum(records["list_sizes"].reshape(-1))[:-1]
    pieces = iter(np.split(words, bounds))
    return [
        {name: next(pieces).view(dtype) for name, dtype in LISTS.items()}
        for _ in range(len(records))
    ]
