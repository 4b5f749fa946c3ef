"""Arrivals, and requests against a server that speaks in fixed words."""

import asyncio
import math
import statistics
import time
from itertools import pairwise

import pytest

from tests.cli.fake_server import FakeServer, serving
from tpllm.cli.bench.client import HTTPStatusError, Server
from tpllm.cli.bench.load import Job, Load, Record, _Pieces, arrival_times, run_load


def jobs(num_jobs: int, num_tokens: int = 3, path: str = "/v1/completions") -> list[Job]:
    body = {"prompt": " a b", "max_tokens": num_tokens}
    return [Job(path, body, num_prompt_tokens=2) for _ in range(num_jobs)]


def load(fake: FakeServer, jobs: list[Job], **limits: float | None) -> Load:
    server = Server(fake.url + "/v1")
    return asyncio.run(run_load(server, jobs, [0.0] * len(jobs), **limits))  # type: ignore[arg-type]


def test_arrivals_are_a_poisson_process_that_a_seed_repeats():
    times = arrival_times(rate=50.0, num_requests=4000, seed=1)
    assert times == arrival_times(50.0, 4000, 1) != arrival_times(50.0, 4000, 2)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0.0 and min(gaps) > 0
    # of an exponential distribution mean and standard deviation are 1 / rate
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.1)
    # and the share of gaps beyond t is exp(-rate * t)
    assert sum(gap > 0.02 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)


def test_a_curve_has_the_same_arrivals_at_every_rate_but_for_their_scale():
    slow, fast = arrival_times(1.0, 50, 3), arrival_times(10.0, 50, 3)
    assert [time / 10 for time in slow] == pytest.approx(fast)
    assert arrival_times(math.inf, 3, 0) == [0.0, 0.0, 0.0]


def test_requests_wait_for_their_arrival():
    with serving(FakeServer()) as fake:
        arrivals = [0.0, 0.1, 0.25]
        begin = time.perf_counter()
        done = asyncio.run(run_load(Server(fake.url), jobs(3), arrivals))
    starts = [record.start - begin for record in done.records]
    assert all(start >= arrival for start, arrival in zip(starts, arrivals, strict=True))
    first, last = done.records[0].start, max(record.end for record in done.records)
    assert done.duration_s == last - first
    assert all(record.late_s >= 0 for record in done.records)


def test_every_piece_is_timed_and_the_server_s_count_holds():
    with serving(FakeServer(first_s=0.05, gap_s=0.02)) as fake:
        [record] = load(fake, jobs(1, num_tokens=4)).records
    assert record.error is None
    assert (record.num_prompt_tokens, record.num_output_tokens) == (2, 4)
    assert len(record.piece_times) == 4
    assert record.ttft_s >= 0.05
    assert record.e2el_s >= 0.05 + 3 * 0.02
    assert record.tpot_s is not None and record.tpot_s >= 0.02 * 0.9
    assert record.start < record.piece_times[0] and record.piece_times[-1] <= record.end


def test_without_usage_pieces_are_counted():
    with serving(FakeServer(counts_usage=False)) as fake:
        [record] = load(fake, jobs(1, num_tokens=5)).records
    assert record.num_output_tokens == 5


@pytest.mark.parametrize("limit, first_s", [(1, 0.01), (3, 0.3), (None, 0.5)])
def test_no_more_run_at_once_than_allowed(limit, first_s):
    with serving(FakeServer(first_s=first_s)) as fake:
        done = load(fake, jobs(6, num_tokens=1), max_concurrency=limit)
    assert fake.most_at_once == (limit or 6)
    assert all(record.error is None for record in done.records)


def test_what_fails_is_noted_and_the_others_go_on():
    fake = FakeServer(refuse=lambda n: n == 0, break_off=lambda n: n == 1)
    with serving(fake):
        done = load(fake, jobs(3), max_concurrency=1)
    refused, broken, fine = done.records
    assert refused.error is not None and "HTTP 429" in refused.error and "too many" in refused.error
    assert broken.error is not None and "closed the connection early" in broken.error
    assert fine.error is None


def test_a_request_that_takes_too_long_is_given_up():
    with serving(FakeServer(first_s=30.0)) as fake:
        [record] = load(fake, jobs(1), timeout_s=0.2).records
    assert record.error == "no complete answer within 0.2 s"


def test_a_server_that_is_not_there_is_named():
    server = Server("http://127.0.0.1:1/v1")
    with pytest.raises(ConnectionError, match="no server answers at http://127.0.0.1:1/v1"):
        asyncio.run(server.call("GET", "/v1/models"))


def test_an_answer_other_than_200_is_an_error_with_its_words():
    with serving(FakeServer(api_key="secret")) as fake:
        with pytest.raises(
            HTTPStatusError, match="/v1/models answers with HTTP 401: .*no such key"
        ):
            asyncio.run(Server(fake.url, "wrong").call("GET", "/v1/models"))
        answer = asyncio.run(Server(fake.url + "/v1/", "secret").call("GET", "/v1/models"))
    assert answer["data"][0]["id"] == "fake"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b"])
def test_a_url_of_another_form_is_refused(url):
    with pytest.raises(ValueError, match="must be of the form http://host:port"):
        Server(url)


# ---- events, in any pieces ---------------------------------------------------------------------

EVENTS = (
    b": a comment\r\n\r\n"
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\r\n\r\n'
    b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
    b'data:{"choices": [{"delta": {"content": "\xc3\xa4"}}]}\n\n'
    b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 7, len(EVENTS)])
def test_events_are_read_from_pieces_of_any_size(size):
    record = Record(1)
    pieces = _Pieces(record)
    for begin in range(0, len(EVENTS), size):
        pieces.on_data(EVENTS[begin : begin + size], float(begin))
    assert pieces.error is None
    assert len(record.piece_times) == 2  # neither the role nor the end is text
    assert (record.num_prompt_tokens, record.num_output_tokens) == (7, 9)


@pytest.mark.parametrize(
    "event, message",
    [
        (b'{"error": {"message": "out of memory"}}', "out of memory"),
        (b"{no json", "which is no completion"),
        (b"[1]", "which is no completion"),
        (b'{"choices": [{"text": 5, "delta": []}]}', "which is no completion"),
        (b'{"choices": [], "usage": {"x": 1}}', "which is no completion"),
    ],
)
def test_an_event_that_is_no_completion_is_an_error(event, message):
    pieces = _Pieces(Record(1))
    pieces.on_data(b"data: " + event + b"\n\n", 0.0)
    assert message in (pieces.error or "")
