from math import inf

import pytest

from tpllm.engine.stats import StepHistogram


def counts(histogram: StepHistogram) -> dict[float, int]:
    """Return the number of steps in each bucket that is not empty, by its upper bound."""
    buckets = histogram.buckets()
    before = [0, *(upto for _, upto in buckets)]
    return {bound: upto - b for (bound, upto), b in zip(buckets, before, strict=False) if upto > b}


def test_a_step_takes_from_the_result_before_it_to_its_own():
    histogram = StepHistogram()
    histogram.note_sent(100.0)
    histogram.note_sent(100.001)
    histogram.note_result(100.3)  # since it was sent: nothing ran before it
    histogram.note_sent(100.301)
    histogram.note_result(100.307)  # 7 ms since the one before
    histogram.note_result(100.319)  # 12 ms
    histogram.note_sent(109.0)  # after a time without requests
    histogram.note_result(109.0018)
    assert counts(histogram) == {0.3: 1, 0.008: 1, 0.015: 1, 0.002: 1}
    assert histogram.total_s == pytest.approx(0.319 + 0.0018)


def test_every_step_is_counted_at_the_bounds_and_beyond_them():
    histogram = StepHistogram()
    now_s = 0.0
    for step_s in (0.0, 0.5, 1e6):
        histogram.note_sent(now_s)
        now_s += step_s
        histogram.note_result(now_s)
    assert counts(histogram) == {0.0005: 1, 0.5: 1, inf: 1}
    assert histogram.buckets()[-1] == (inf, 3)
