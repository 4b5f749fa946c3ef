"""Ids of requests, in answers and in the log."""

import logging

import httpx
import pytest
from openai import NotFoundError

from tests.leaks import wait_until
from tests.server.conftest import Served, running_server
from tests.server.test_http import CHAT, HELLO, error_of

LONGEST = "x" * 128


@pytest.mark.parametrize("sent", ["abc", "0b7e-!~", LONGEST])
def test_a_clients_id_comes_back(http: httpx.Client, sent: str) -> None:
    for path, status in (("/health", 200), ("/nothing", 404), (CHAT, 405)):
        answer = http.get(path, headers={"x-request-id": sent})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, sent)


@pytest.mark.parametrize("sent", [None, "", "two words", "a\tb", "é", LONGEST + "x"])
def test_a_missing_or_invalid_id_is_replaced(http: httpx.Client, sent: str | None) -> None:
    headers = [] if sent is None else [(b"x-request-id", sent.encode())]
    ids = {http.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and all(each.startswith("req_") for each in ids)


def test_streams_and_refusals_have_an_id(served: Served, http: httpx.Client) -> None:
    with http.stream("POST", CHAT, json={**HELLO, "stream": True}) as stream:
        assert stream.headers["x-request-id"].startswith("req_")
    foreign = http.get("/health", headers={"host": "evil.example", "x-request-id": "abc"})
    assert foreign.headers["x-request-id"] == "abc"
    with served.openai() as client, pytest.raises(NotFoundError) as refused:
        client.completions.create(model="gpt-9", prompt="x")
    assert (refused.value.request_id or "").startswith("req_")


def test_the_log_has_the_id_and_a_path_of_bounded_length(caplog: pytest.LogCaptureFixture) -> None:
    with (
        running_server(log_requests=True) as served,
        served.http() as http,
        caplog.at_level(logging.INFO, "tpllm.server"),
    ):
        http.get("/" + "x" * 5000, headers={"x-request-id": "abc"})
        http.head("/health")
        assert wait_until(lambda: "path=/health" in caplog.text)
    lines = [line for line in caplog.messages if line.startswith("method=")]
    assert lines[0].endswith(" id=abc") and len(lines[0]) < 400
    assert lines[1].startswith("method=HEAD path=/health status=200 outcome=ok ")


def test_a_bug_of_the_server_is_logged_and_has_openais_format(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running_server() as served, served.http() as http:
        config, served.engine.config = served.engine.config, None
        failed = http.get("/v1/models", headers={"x-request-id": "abc"})
        assert error_of(failed, 500)["type"] == "server_error"
        assert failed.headers["x-request-id"] == "abc"
        assert "NoneType" not in failed.text and "NoneType" in caplog.text
        served.engine.config = config
        assert 'outcome="error",path="/v1/models"' in http.get("/metrics").text
