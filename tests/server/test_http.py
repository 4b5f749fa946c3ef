"""Raw HTTP: wrong bodies, keys, limits, slow and half-closed clients."""

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, NotFoundError

from tests.leaks import wait_until
from tests.server.conftest import Served, running_server

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
GET = b"GET /version HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 \d{3}")


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's format and this status."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def read_all(sock: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    data = b""
    with suppress(ConnectionResetError):
        while more := sock.recv(65536):
            data += more
    return data


def answers(served: Served, *parts: bytes, pause_s: float = 0.0, num: int = 1) -> list[bytes]:
    """The first lines of what the server answers to `parts`, sent one after the other."""
    with served.connect() as sock:
        with suppress(ConnectionError):
            for part in parts:
                sock.sendall(part)
                time.sleep(pause_s)
        data = b""
        with suppress(ConnectionError):
            while len(STATUS.findall(data)) < num and (more := sock.recv(65536)):
                data += more
    return STATUS.findall(data)


# ---- bodies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "the body is not valid JSON"),
        (b"", "the body must be a JSON object"),
        (b"[]", "the body must be a JSON object"),
        (b"\xff\xfe\x00", "the body cannot be read as JSON"),
        (b"[" * 100_000, "the body cannot be read as JSON"),
        (b'{"messages": 5}', "messages=5 must be a list"),
        (b"{}", "messages is missing"),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "messages[0].content holds a lone surrogate",
        ),
        (b'{"messages": [], "\\ud800": 1}', "the name of a field is not valid Unicode"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "x": "\\ud800"}',
            "there is no field 'x'",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            "temperature=nan must be",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e999}',
            "seed=inf must be a",
        ),
    ],
)
def test_a_wrong_body_is_refused_in_openais_format(
    http: httpx.Client, body: bytes, message: str
) -> None:
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["message"].startswith(message), error["message"]
    assert error["type"] == "invalid_request_error"


def test_the_content_type_must_be_json(http: httpx.Client) -> None:
    # a page of another origin can send text/plain without asking: it must not reach the model
    body = json.dumps(HELLO)
    response = http.post(CHAT, content=body, headers={"content-type": "text/plain"})
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


def test_unknown_paths_and_methods_are_refused(http: httpx.Client) -> None:
    assert "/v1/nothing" in error_of(http.get("/v1/nothing"), 404)["message"]
    refused = http.get(CHAT)
    assert "GET is not allowed" in error_of(refused, 405)["message"]
    assert refused.headers["allow"] == "POST"
    assert http.delete("/v1/models").headers["allow"] == "GET, HEAD"
    assert error_of(http.get("/v1/models/gpt-9"), 404)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/v1/models", "/v1/models/fake", "/metrics", "/version", "/openapi.json"],
)
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    get, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    differing = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
    assert set(head.headers) == set(get.headers)
    for name in set(get.headers) - differing:
        assert head.headers[name] == get.headers[name]
    assert int(head.headers["content-length"]) > 0
    assert http.get("/version").status_code == 200  # over the same connection


def test_head_is_refused_wherever_get_is(http: httpx.Client) -> None:
    refused = http.head(CHAT)
    assert (refused.status_code, refused.content) == (405, b"")
    assert refused.headers["allow"] == "POST"
    assert http.head("/v1/models/gpt-9").status_code == 404


def test_another_model_is_not_found(served: Served) -> None:
    with served.openai() as client, pytest.raises(NotFoundError) as refused:
        client.completions.create(model="gpt-9", prompt="x")
    assert refused.value.code == "model_not_found"
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == "model"


@pytest.fixture(scope="module")
def strict() -> Iterator[Served]:
    """A server with a key and narrow limits."""
    with running_server(
        api_key="s3cret",
        max_body_bytes=2000,
        client_timeout_s=0.5,
        cors_origins=["https://good.example"],
        log_requests=True,
    ) as served:
        yield served


@pytest.fixture
def with_key(strict: Served) -> Iterator[httpx.Client]:
    with strict.http(headers={"authorization": "Bearer s3cret"}) as http:
        yield http


def test_a_body_beyond_the_limit_is_refused(with_key: httpx.Client) -> None:
    body = json.dumps({**HELLO, "user": "x" * 3000}).encode()
    json_type = {"content-type": "application/json"}
    error = error_of(with_key.post(CHAT, content=body, headers=json_type), 413)
    assert error["code"] == "body_too_large"
    parts = (body[i : i + 500] for i in range(0, len(body), 500))  # without a Content-Length
    error_of(with_key.post(CHAT, content=parts, headers=json_type), 413)
    assert with_key.post(CHAT, json=HELLO).status_code == 200


def test_a_huge_body_is_refused_without_being_kept(with_key: httpx.Client) -> None:
    parts = (b" " * 100_000 for _ in range(300))
    response = with_key.post(CHAT, content=parts, headers={"content-type": "application/json"})
    error_of(response, 413)


# ---- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        "s3cret",
        "Bearer",
        "Bearer s3cre",
        "Bearer s3cret2",
        "Basic s3cret",
        "Bearer é",
    ],
)
def test_without_the_key_nothing_is_revealed(strict: Served, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value.encode("latin-1")}
    with strict.http(headers=headers) as http:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            error = error_of(http.get(path), 401)
            assert error["code"] == "invalid_api_key"
            assert error["type"] == "invalid_request_error"
            assert "s3cre" not in error["message"]
        num_seen = len(strict.engine.seen)
        error_of(http.post(CHAT, json=HELLO), 401)
        assert len(strict.engine.seen) == num_seen
        assert http.get("/health").json() == {"status": "ok"}  # and nothing of the inside


def test_openais_client_sends_the_key(strict: Served) -> None:
    with strict.openai("s3cret") as client:
        assert [model.id for model in client.models.list()] == ["fake"]
    with strict.openai("wrong") as client, pytest.raises(AuthenticationError) as refused:
        client.models.list()
    assert refused.value.response.headers["www-authenticate"] == "Bearer"


def test_requests_are_logged_without_their_secrets(
    strict: Served, with_key: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "tpllm.server"):
        private = {"messages": [{"role": "user", "content": "my diary"}]}
        assert with_key.post(CHAT + "?q=my+query", json=private).status_code == 200
        with strict.http() as http:
            http.get("/v1/models", headers={"authorization": "Bearer hush"})
        assert wait_until(lambda: len(caplog.messages) >= 2)
    assert "method=POST path=/v1/chat/completions status=200 outcome=ok" in caplog.text
    assert "path=/v1/models status=401 outcome=invalid" in caplog.text
    assert not any(word in caplog.text for word in ("diary", "query", "s3cret", "hush"))


def test_no_repr_shows_the_key() -> None:
    from tpllm.server import ServerSettings

    assert "s3cret" not in repr(ServerSettings(api_key="s3cret"))


# ---- clients that are gone, slow or broken ---------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "half-close"])
def test_a_client_that_hangs_up_ends_its_request(served: Served, stream: bool, how: str) -> None:
    served.hold()
    body = json.dumps({**HELLO, "stream": stream}).encode()
    with served.connect() as sock:
        sock.sendall(head(CHAT, len(body)) + body)
        assert wait_until(lambda: served.engine.num_running == 1)
        if how == "half-close":  # it looks like a client that is gone
            sock.shutdown(socket.SHUT_WR)
            assert wait_until(lambda: served.engine.num_running == 0)
    assert wait_until(lambda: served.engine.num_running == 0)
    assert len(served.engine.gone) == 1
    served.go_on()


def test_a_stream_that_is_left_early_ends_its_request(served: Served) -> None:
    served.engine.reply = "x" * 500
    served.engine.step_s = 0.01
    with served.openai() as client:
        stream = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "x"}], stream=True
        )
        next(iter(stream))
        stream.close()
        assert wait_until(lambda: served.engine.num_running == 0)
    assert len(served.engine.gone) == 1


def test_all_prompts_of_a_request_end_with_it(served: Served) -> None:
    served.hold()
    body = json.dumps({"prompt": ["a", "b", "c"]}).encode()
    with served.connect() as sock:
        sock.sendall(head("/v1/completions", len(body)) + body)
        assert wait_until(lambda: served.engine.num_running == 3)
    assert wait_until(lambda: len(served.engine.gone) == 3)


def test_an_incomplete_request_times_out(strict: Served) -> None:
    for beginning in (
        b"",
        b"POST /v1",
        head(CHAT, 100).replace(b"host", b"authorization: Bearer s3cret\r\nhost") + b"{",
    ):
        with strict.connect() as sock:
            sock.sendall(beginning)
            answer = read_all(sock)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_disconnected(strict: Served) -> None:
    engine = strict.engine
    engine.reply, engine.chars_per_step = "x" * 1900, 1
    body = json.dumps({**HELLO, "stream": True, "n": 100, "logprobs": True}).encode()
    key = b"authorization: Bearer s3cret\r\nhost"
    try:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", strict.port))
            sock.sendall(head(CHAT, len(body)).replace(b"host", key) + body)
            assert wait_until(lambda: engine.num_running == 100)
            assert wait_until(lambda: engine.num_running == 0)
        assert len(engine.gone) == 1
    finally:
        engine.reply, engine.chars_per_step = None, 3


def test_an_endless_head_is_refused(served: Served) -> None:
    with served.connect() as sock:
        with suppress(ConnectionError):
            sock.sendall(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000)
        assert read_all(sock)[:12] in (b"HTTP/1.1 431", b"")


def test_invalid_http_is_refused_in_openais_format(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] is None


def test_a_connection_serves_several_requests(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.post(CHAT, json=HELLO).status_code == 200
