"""All token sequences that spell a word, for bad_words.

A model can generate "not" as n, o, t, though a tokenizer never encodes it so. A word of L bytes has
up to 2**(L - 1) spellings: with Qwen's vocabulary about 100 for 7 characters, 3,000 for 13.
"""

from collections.abc import Iterator, Mapping, Sequence

# The token ids of all spellings of a request's words are at most so many. A word beyond its share
# is banned only in its shortest spellings, which are the likelier ones.
MAX_SPELLING_IDS = 4096
MAX_SPELLED_BYTES = 64  # longer words have too many spellings for a share to matter


def spellings(word: bytes, ids_of: Mapping[bytes, Sequence[int]]) -> Iterator[list[int]]:
    """Yield every token sequence whose bytes are `word`, the shortest first.

    Args:
        ids_of: the tokens of each byte sequence
    """
    length = len(word)
    if length > MAX_SPELLED_BYTES:
        return
    # for each byte, the tokens that begin there: their ends and ids
    tokens_at = [
        [(j, ids_of[word[i:j]]) for j in range(i + 1, length + 1) if word[i:j] in ids_of]
        for i in range(length)
    ]
    # bit k of an entry: whether k tokens can spell the rest of the word from that byte on
    counts = [0] * length + [1]
    for i in reversed(range(length)):
        for j, _ in tokens_at[i]:
            counts[i] |= counts[j] << 1

    def of_tokens(begin: int, num_tokens: int) -> Iterator[list[int]]:
        if num_tokens == 0:
            yield []
            return
        for end, ids in tokens_at[begin]:
            if counts[end] >> (num_tokens - 1) & 1:
                for rest in of_tokens(end, num_tokens - 1):
                    for token_id in ids:
                        yield [token_id, *rest]

    for num_tokens in range(1, length + 1):
        if counts[0] >> num_tokens & 1:
            yield from of_tokens(0, num_tokens)


def most_ids(words: Sequence[str]) -> int:
    """Return an upper bound on the token ids of all spellings, without a tokenizer."""
    num_bytes = [len(word.encode(errors="replace")) + 1 for word in words]
    others = sum(num << min(num, 16) for num in num_bytes)
    return 2 * sum(num_bytes) + min(others, MAX_SPELLING_IDS)
