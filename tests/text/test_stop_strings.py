import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.text.stop_strings import find_stop, num_undecided

short = st.text("ab", min_size=1, max_size=4)


def first_met(text: str, num_old: int, stops: list[str]) -> tuple[str, int, int] | None:
    """The stop string that a search character by character finds first."""
    for end in range(num_old + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return stop, end - len(stop), end
    return None


@settings(deadline=None, derandomize=True, database=None)
@given(text=st.text("ab", max_size=12), data=st.data(), stops=st.lists(short, max_size=3))
def test_the_stop_string_that_ends_first_is_found(text, data, stops):
    num_old = data.draw(st.integers(0, len(text)))
    assert find_stop(text, num_old, stops) == first_met(text, num_old, stops)


@settings(deadline=None, derandomize=True, database=None)
@given(text=st.text("ab", max_size=12), stops=st.lists(short, max_size=3))
def test_what_may_begin_a_stop_string_is_undecided(text, stops):
    begins = [stop[:n] for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    assert num_undecided(text, stops) == max(map(len, begins), default=0)


@pytest.mark.parametrize("text, undecided", [("a\n", 1), ("a\nUser", 5), ("a\nUser:", 0), ("", 0)])
def test_an_answer_is_held_back_no_longer_than_it_must(text, undecided):
    assert num_undecided(text, ["\nUser:"]) == undecided
