"""A run's figures, from records whose times are known."""

import pytest

from tpllm.cli.bench.load import Load, Record
from tpllm.cli.bench.report import (
    distribution_ms,
    parse_objectives,
    print_curve,
    print_run,
    summarize,
)


def record(
    start: float, times: list[float], *, num_out: int | None = None, error: str | None = None
) -> Record:
    return Record(
        num_prompt_tokens=10,
        start=start,
        piece_times=times,
        end=times[-1] if times else start,
        num_output_tokens=len(times) if num_out is None else num_out,
        error=error,
    )


RECORDS = [
    record(0.0, [0.1, 0.12, 0.16]),  # first token after 100 ms, then 20 and 40 ms
    record(1.0, [1.3, 1.31], num_out=3),  # two tokens came in one piece
    record(2.0, [2.5]),
    record(3.0, [], error="HTTP 429"),
]
LOAD = Load(RECORDS, duration_s=4.0, cpu_s=1.0)


def test_what_one_request_saw():
    first, second, third, _ = RECORDS
    assert first.ttft_s == pytest.approx(0.1)
    assert first.itl_s == pytest.approx([0.02, 0.04])
    assert first.tpot_s == pytest.approx(0.03)
    assert first.e2el_s == pytest.approx(0.16)
    assert second.itl_s == pytest.approx([0.01])
    assert second.tpot_s == pytest.approx(0.005)
    assert third.tpot_s is None and third.itl_s == []


def test_percentiles_are_of_all_requests_and_all_gaps():
    figures = summarize(LOAD, {})
    assert figures["ttft_ms"] == {"mean": 300, "p50": 300, "p90": 460, "p99": 496}
    # of 10, 20 and 40 ms, linear between neighbours
    assert figures["itl_ms"] == {"mean": 23.333, "p50": 20, "p90": 36, "p99": 39.6}
    assert figures["tpot_ms"] == {"mean": 17.5, "p50": 17.5, "p90": 27.5, "p99": 29.75}
    assert figures["e2el_ms"]["p50"] == 310
    assert distribution_ms([]) is None


def test_throughput_counts_what_was_completed():
    figures = summarize(LOAD, {})
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert figures["errors"] == {"HTTP 429": 1}
    assert (figures["input_tokens"], figures["output_tokens"]) == (30, 7)
    assert figures["requests_per_s"] == 0.75
    assert figures["output_tokens_per_s"] == 1.75
    assert figures["total_tokens_per_s"] == 9.25
    assert figures["client"]["cpu_share"] == 0.25
    assert "goodput_requests_per_s" not in figures


@pytest.mark.parametrize(
    "words, num_good",
    [
        (["ttft:100.001"], 1),
        (["ttft:300.001"], 2),
        (["ttft:1000"], 3),
        (["ttft:1000", "tpot:10"], 2),  # an output of one token takes no time per token
        (["ttft:200", "tpot:10"], 0),
        (["e2el:310.001"], 2),
    ],
)
def test_goodput_counts_requests_that_keep_every_objective(words, num_good):
    figures = summarize(LOAD, parse_objectives(words))
    assert figures["goodput_requests_per_s"] == num_good / 4


@pytest.mark.parametrize("word", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:nan", "itl:5", ":5"])
def test_an_objective_of_another_form_is_refused(word):
    with pytest.raises(ValueError, match=f"--goodput {word} must be NAME:MILLISECONDS"):
        parse_objectives([word])


def test_the_tables_hold_the_figures(capsys):
    figures = {"request_rate": 2.0, "max_concurrency": None} | summarize(LOAD, {"ttft": 350.0})
    print_run("2 requests per second", figures)
    shown = capsys.readouterr().out
    assert "3 completed, 1 failed" in shown and "1 x HTTP 429" in shown
    assert "0.75 requests/s, 1.8 output tokens/s" in shown
    assert "goodput      0.50 requests/s" in shown
    assert "time to first token       300.00    300.00    460.00    496.00" in shown
    assert "25% of a core" in shown
    print_curve([figures, figures])
    heads, *rows = capsys.readouterr().out.strip().splitlines()
    assert heads.startswith("rate    streams      req/s  out tok/s   ttft p50   ttft p99")
    assert heads.endswith("itl p50    itl p99   e2el p50   e2el p99     good/s")
    assert [row.split()[:4] for row in rows] == [["2.00", "any", "0.75", "1.75"]] * 2


def test_a_run_in_which_all_failed_has_no_latencies(capsys):
    figures = summarize(Load([record(0.0, [], error="refused")], 0.0, 0.0), {"ttft": 1.0})
    assert figures["ttft_ms"] is None and figures["requests_per_s"] == 0
    print_run("all failed", figures)
    print_curve([{"request_rate": 1.0, "max_concurrency": 4} | figures])
    assert "0 completed, 1 failed" in capsys.readouterr().out


def test_a_client_at_its_limit_says_so(capsys):
    figures = summarize(Load(RECORDS, duration_s=1.0, cpu_s=0.9), {})
    print_run("busy", figures)
    assert "these latencies are partly its own" in capsys.readouterr().out
