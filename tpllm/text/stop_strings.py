"""Find stop strings in a growing text, regardless of token boundaries."""

from collections.abc import Sequence


def find_stop(text: str, num_old: int, stops: Sequence[str]) -> tuple[str, int, int] | None:
    """Return the stop string that ends first in `text`, its begin and its end.

    If two end at the same character, the first in `stops` counts.

    Args:
        text: the text so far
        num_old: number of characters that were searched before; no stop string ends in them
    """
    first = None
    for stop in stops:
        begin = text.find(stop, max(0, num_old - len(stop) + 1))
        if begin >= 0 and (first is None or begin + len(stop) < first[2]):
            first = (stop, begin, begin + len(stop))
    return first


def num_undecided(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
