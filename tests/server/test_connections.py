"""What a client can send beyond a plain request: limits, trailers, chunks, pipelines, HTTP/1.0."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.leaks import wait_until
from tests.scripts import ROOT
from tests.server.conftest import Served, running_server
from tests.server.test_http import CHAT, GET, HELLO, STATUS, answers, head, read_all
from tpllm.server import connections
from tpllm.server.connections import MAX_FIELDS, MAX_HEAD_BYTES

BODY = json.dumps(HELLO).encode()
CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    "transfer-encoding: chunked\r\n\r\n"
).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def read_answer(sock: socket.socket) -> bytes:
    """Read one answer by its Content-Length, and nothing after it."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(1)
    length = re.search(rb"content-length: (\d+)", answer)
    left = int(length[1]) if length else 0
    while left:
        part = sock.recv(left)
        answer, left = answer + part, left - len(part)
    return answer


def padded(size: int) -> bytes:
    """A GET whose head has `size` bytes."""
    begin, end = b"GET /version HTTP/1.1\r\nhost: 127.0.0.1\r\na: ", b"\r\n\r\n"
    return begin + b"x" * (size - len(begin) - len(end)) + end


# ---- heads -----------------------------------------------------------------------------------


def test_spaces_around_a_header_value_are_stripped(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nhost:  localhost \t\r\nx-request-id: mine \r\n\r\n")
        answer = read_answer(sock)
    assert answer.startswith(b"HTTP/1.1 200") and b"x-request-id: mine\r\n" in answer


@pytest.mark.parametrize("piece", [1000, 2**16 - 2, 2**16 - 1, 2**16, 2**20])
def test_a_head_has_an_exact_limit_in_any_pieces(served: Served, piece: int) -> None:
    for size, status in ((MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, 431)):
        data = padded(size)
        pieces = [data[i : i + piece] for i in range(0, size, piece)]
        assert answers(served, *pieces) == [b"HTTP/1.1 %d" % status]


def test_the_head_of_a_second_request_has_the_same_limit(served: Served) -> None:
    firsts = [
        GET,
        head(CHAT, len(BODY)) + BODY,
        CHUNKED + chunk(BODY) + b"0\r\n\r\n",
        CHUNKED + chunk(BODY) + b"0\r\na: b\r\n\r\n",
    ]
    for first in firsts:
        for size, status in ((MAX_HEAD_BYTES, 200), (MAX_HEAD_BYTES + 1, 431)):
            both = answers(served, first + padded(size), num=2)
            assert both == [b"HTTP/1.1 200", b"HTTP/1.1 %d" % status]


def test_a_head_has_a_limit_of_fields(served: Served) -> None:
    begin = b"GET /version HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    assert answers(served, begin + b"a: b\r\n" * (MAX_FIELDS - 1) + b"\r\n") == [b"HTTP/1.1 200"]
    assert answers(served, begin + b"a: b\r\n" * MAX_FIELDS + b"\r\n") == [b"HTTP/1.1 431"]


@pytest.mark.parametrize(
    "fields",
    [
        b"content-length: 1\r\ncontent-length: 1\r\n",
        b"content-length: 1\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"content-length: -1\r\n",
        b"a: b\r\n folded\r\n",
        b"a : b\r\n",
        b"a: b\n",
    ],
)
def test_an_ambiguous_head_is_refused(served: Served, fields: bytes) -> None:
    request = (
        b"POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\n" + fields + b"\r\n1\r\na\r\n0\r\n\r\n"
    )
    assert answers(served, request, num=2) == [b"HTTP/1.1 400"]


def test_an_answer_to_invalid_http_has_an_id(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(b"this is no HTTP\r\n\r\n")
        assert b"\r\nx-request-id: req_" in read_all(sock)


# ---- trailers and chunks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "trailer",
    [b"authorization: Bearer s3cret", b"Authorization: Bearer s3cret\r\nhost: 127.0.0.1"],
)
def test_a_key_in_a_trailer_does_not_count(trailer: bytes) -> None:
    with running_server(api_key="s3cret") as served:
        end = b"0\r\n" + trailer + b"\r\n\r\n"
        assert answers(served, CHUNKED + chunk(BODY) + end) == [b"HTTP/1.1 401"]
        assert answers(served, CHUNKED, chunk(BODY), end, pause_s=0.05) == [b"HTTP/1.1 401"]


@pytest.mark.parametrize(
    "trailer, request_head, status",
    [
        (b"connection: close", CHUNKED, 200),
        (b"expect: 100-continue", CHUNKED, 200),
        (b"connection: upgrade\r\nupgrade: websocket", CHUNKED, 200),
        (b"host: evil.example\r\norigin: http://evil.example", CHUNKED, 200),
        (
            b"content-type: application/json",
            CHUNKED.replace(b"application/json", b"text/plain"),
            400,
        ),
        (b"host: 127.0.0.1", CHUNKED.replace(b"127.0.0.1", b"evil.example"), 403),
    ],
)
def test_a_field_in_a_trailer_is_not_a_header(
    served: Served, trailer: bytes, request_head: bytes, status: int
) -> None:
    request = request_head + chunk(BODY) + b"0\r\n" + trailer + b"\r\n\r\n"
    both = answers(served, request + GET, num=2)
    assert both == [b"HTTP/1.1 %d" % status, b"HTTP/1.1 200"]


FIELD = b"a: " + b"x" * 95 + b"\r\n"
ENDLESS = {
    "fields": (CHUNKED + chunk(BODY) + b"0\r\n", FIELD),
    "one field": (CHUNKED + chunk(BODY) + b"0\r\na: ", b"x" * 100),
    "one name": (CHUNKED + chunk(BODY) + b"0\r\n", b"x" * 100),
    "an extension": (CHUNKED + b"1;a=", b"x" * 100),
    "zeros": (CHUNKED, b"0" * 100),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_trailers_and_chunk_extensions_are_limited_like_a_head(served: Served, kind: str) -> None:
    begin, more = ENDLESS[kind]
    with served.connect() as sock:
        num_sent = 0
        with pytest.raises(ConnectionError):
            sock.sendall(begin)
            while num_sent < 100 * 2**20:
                sock.sendall(more * 100)
                num_sent += len(more) * 100
    # the kernels' buffers take some, too
    assert num_sent < 30 * 2**20


def test_a_trailer_has_an_exact_limit(served: Served) -> None:
    fields = FIELD * (MAX_HEAD_BYTES // len(FIELD))
    last = b"b: " + b"y" * (MAX_HEAD_BYTES - len(fields) - 5)
    request = CHUNKED + chunk(BODY) + b"0\r\n" + fields
    assert answers(served, request + last + b"\r\n\r\n") == [b"HTTP/1.1 200"]
    assert answers(served, request + last + b"y\r\n\r\n") == []


def test_small_chunks_and_extensions_are_read(served: Served) -> None:
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in BODY)
    whole = CHUNKED + chunks + b"0\r\n\r\n"
    assert answers(served, whole) == [b"HTTP/1.1 200"]
    assert answers(served, *(bytes([byte]) for byte in whole)) == [b"HTTP/1.1 200"]


def test_a_blank_line_does_not_end_a_body(served: Served) -> None:
    body = BODY.replace(b"{", b"{\r\n\r\n\r\n\r\n", 1)
    for request in (head(CHAT, len(body)) + body, CHUNKED + chunk(body) + b"0\r\n\r\n"):
        assert answers(served, request + GET, num=2) == [b"HTTP/1.1 200"] * 2


# ---- several requests, other protocols -------------------------------------------------------


def test_pipelined_requests_are_answered_one_after_the_other(served: Served) -> None:
    post = head(CHAT, len(BODY)) + BODY
    assert answers(served, (GET + post) * 20, num=40) == [b"HTTP/1.1 200"] * 40
    assert len(served.engine.seen) == 20


def test_a_request_behind_one_that_runs_waits_unread(served: Served) -> None:
    served.hold()
    with served.connect() as sock:
        sock.sendall(head(CHAT, len(BODY)) + BODY + GET * 1000)
        assert wait_until(lambda: served.engine.num_running == 1)
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        served.go_on()
        sock.settimeout(30)
        data = b""
        while data.count(b"HTTP/1.1 200") < 1001:
            data += sock.recv(65536)


@pytest.mark.parametrize("cut", [None, 20, 66, 70, 1])
def test_an_offer_to_upgrade_is_ignored(served: Served, cut: int | None) -> None:
    """Java's client offers h2c with each request, also in small packets, and expects an answer."""
    offer = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUPGRADE: h2c\r\nHTTP2-Settings: AA\r\n"
    posts = [head(CHAT, len(BODY)) + BODY, CHUNKED + chunk(BODY) + b"0\r\n\r\n"]
    for post in posts:
        data = post.replace(b"\r\n", offer, 1) + GET
        step = cut or len(data)
        pieces = [data[i : i + step] for i in range(0, len(data), step)]
        assert answers(served, *pieces, num=2) == [b"HTTP/1.1 200"] * 2


def test_a_websocket_is_refused(served: Served) -> None:
    offer = b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    assert answers(served, GET.replace(b"\r\n", offer, 1)) == [b"HTTP/1.1 200"]
    evil = GET.replace(b"127.0.0.1", b"evil.example")
    assert answers(served, evil.replace(b"\r\n", offer, 1)) == [b"HTTP/1.1 403"]


def test_a_client_may_wait_for_100_continue(served: Served) -> None:
    request = head(CHAT, len(BODY)).replace(b"host", b"expect: 100-continue\r\nhost")
    with served.connect() as sock:
        sock.sendall(request)
        assert read_answer(sock).startswith(b"HTTP/1.1 100 ")
        sock.sendall(BODY)
        assert read_answer(sock).startswith(b"HTTP/1.1 200 ")
        sock.sendall(request.replace(b"127.0.0.1", b"evil.example"))
        assert read_answer(sock).startswith(b"HTTP/1.1 403 ")


def test_a_body_after_a_refusal_is_dropped_and_then_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MAX_DROPPED_BYTES", 10_000)
    with running_server(api_key="s3cret") as served:
        small = head(CHAT, 9000) + b" " * 9000
        assert answers(served, small, GET, pause_s=0.1, num=2) == [b"HTTP/1.1 401"] * 2
        with served.connect() as sock:
            sock.sendall(head(CHAT, 10**9))
            assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")
            with pytest.raises(ConnectionError):
                for _ in range(1000):
                    sock.sendall(b" " * 10_000)
                    time.sleep(0.001)


def test_a_body_that_does_not_end_after_its_refusal_gets_no_second_answer() -> None:
    with running_server(api_key="s3cret", client_timeout_s=0.3) as served, served.connect() as sock:
        sock.sendall(head(CHAT, 1000) + b" ")
        assert STATUS.findall(read_all(sock)) == [b"HTTP/1.1 401"]


# ---- HTTP/1.0 --------------------------------------------------------------------------------


def http10(path: str, body: bytes, fields: bytes = b"") -> bytes:
    request = head(path, len(body)).replace(b"HTTP/1.1", b"HTTP/1.0") + body
    return request.replace(b"host", fields + b"host", 1)


def test_http_1_0_gets_no_chunks(served: Served) -> None:
    body = json.dumps({**HELLO, "stream": True}).encode()
    for fields in (b"", b"connection: keep-alive\r\n", b"expect: 100-continue\r\n"):
        with served.connect() as sock:
            sock.sendall(http10(CHAT, body, fields))
            first, _, rest = read_all(sock).partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 200") and b"connection: close" in first
        assert b"transfer-encoding" not in first and b"content-length" not in first
        assert rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")


def test_http_1_0_may_keep_its_connection_where_the_length_is_known(served: Served) -> None:
    with served.connect() as sock:
        for _ in range(2):
            sock.sendall(http10(CHAT, BODY, b"connection: keep-alive\r\n"))
            answer = read_answer(sock)
            assert b"\r\nconnection: keep-alive\r\n" in answer and b"content-length" in answer
        sock.sendall(http10(CHAT, BODY))
        assert b"\r\nconnection: close\r\n" in read_all(sock)


# ---- memory ----------------------------------------------------------------------------------

SERVER = """
import asyncio
from tests.server.fake_engine import FakeEngine
from tpllm.server import ServerSettings, serve
from tpllm.server.serving import listening_socket

async def main(settings, sock):
    sock.listen()
    print(sock.getsockname()[1], flush=True)
    await serve(FakeEngine(), settings, sock)

settings = ServerSettings(port=0, api_key="s3cret")
with listening_socket(settings) as sock:
    asyncio.run(main(settings, sock))
"""


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[int, int]]:
    """A server with a key in a process of its own: its pid and port."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.pid, int(server.stdout.readline())
        server.terminate()


@contextmanager
def connected(port: int, num: int) -> Iterator[list[socket.socket]]:
    socks = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(num)]
    try:
        yield socks
    finally:
        for each in socks:
            each.close()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", [*ENDLESS, "pipeline", "small fields", "body", "small chunks"])
def test_a_client_without_a_key_cannot_fill_the_memory(process: tuple[int, int], kind: str) -> None:
    pid, port = process
    begin, more = {
        **ENDLESS,
        "pipeline": (b"", GET),
        "small fields": (b"GET / HTTP/1.1\r\n", b"a:b\r\n"),
        "body": (head(CHAT, 10**9), b" " * 100),
        "small chunks": (CHUNKED, b"1;a=b\r\nx\r\n"),
    }[kind]
    block = more * (2**18 // len(more))
    with connected(port, 10) as socks:
        before = resident_bytes(pid)
        for each in socks:
            each.setblocking(False)
            with suppress(OSError):
                each.sendall(begin)
        largest = 0
        for _ in range(40):  # of 2.5 MB each
            for each in socks:
                with suppress(OSError):
                    each.send(block)
            time.sleep(0.005)
            largest = max(largest, resident_bytes(pid))
    assert largest - before < 40 * 2**20
