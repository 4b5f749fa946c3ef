"""Stop strings in a growing text, wherever the borders of its tokens are."""

from collections.abc import Sequence


def find_stop(text: str, num_old: int, stops: Sequence[str]) -> tuple[str, int, int] | None:
    """The stop string that a text reading on character by character would meet first.

    Args:
        text: so far
        num_old: characters of it in which no stop string may end, since they were searched before

    Returns:
        the stop string, where it begins and where it ends; of two that end together, the one that
        stands first in `stops`
    """
    first = None
    for stop in stops:
        begin = text.find(stop, max(0, num_old - len(stop) + 1))
        if begin >= 0 and (first is None or begin + len(stop) < first[2]):
            first = (stop, begin, begin + len(stop))
    return first


def num_undecided(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may become the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
