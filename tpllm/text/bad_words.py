"""Token sequences that spell a word, for bad_words: the tokenizer's own way, and all others.

A model may write "not" as n, o, t, though a tokenizer never would. A word of L bytes has up to
2**(L - 1) spellings: with Qwen's vocabulary some 100 for 7 letters, 3,000 for 13.
"""

from collections.abc import Iterator, Mapping, Sequence

# The words of a request share so many ids of spellings. Beyond its share a word is banned in its
# shortest spellings alone, which are the likelier ones.
MAX_SPELLING_IDS = 4096
MAX_SPELLED_BYTES = 64  # longer words have too many spellings for a share to matter


def spellings(word: bytes, ids_of: Mapping[bytes, Sequence[int]]) -> Iterator[list[int]]:
    """Every token sequence whose bytes are `word`, those of the fewest tokens first.

    Args:
        ids_of: the tokens of each byte sequence
    """
    length = len(word)
    if length > MAX_SPELLED_BYTES:
        return
    # tokens that begin at each byte: where they end, and their ids
    begun = [
        [(j, ids_of[word[i:j]]) for j in range(i + 1, length + 1) if word[i:j] in ids_of]
        for i in range(length)
    ]
    # bit k of an entry: whether k tokens can spell the rest of the word from that byte on
    counts = [0] * length + [1]
    for i in reversed(range(length)):
        for j, _ in begun[i]:
            counts[i] |= counts[j] << 1

    def of_tokens(begin: int, num_tokens: int) -> Iterator[list[int]]:
        if num_tokens == 0:
            yield []
            return
        for end, ids in begun[begin]:
            if counts[end] >> (num_tokens - 1) & 1:
                for rest in of_tokens(end, num_tokens - 1):
                    for token_id in ids:
                        yield [token_id, *rest]

    for num_tokens in range(1, length + 1):
        if counts[0] >> num_tokens & 1:
            yield from of_tokens(0, num_tokens)


def most_ids(words: Sequence[str]) -> int:
    """A bound on the ids of all spellings of a request's words, without a tokenizer."""
    num_bytes = [len(word.encode(errors="replace")) + 1 for word in words]
    others = sum(num << min(num, 16) for num in num_bytes)
    return 2 * sum(num_bytes) + min(others, MAX_SPELLING_IDS)
