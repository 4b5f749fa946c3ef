"""HTTP/1.1 as servers write it, in any pieces."""

import asyncio

import pytest

from tpllm.cli.bench.client import Exchange


class Transport(asyncio.Transport):
    """Takes what is written, and notes its end."""

    def __init__(self) -> None:
        self.ended = False

    def write(self, data: object) -> None:
        pass

    def abort(self) -> None:
        self.ended = True


def answered(answer: bytes, size: int, *, ends: bool = False) -> tuple[int, bytes]:
    """What becomes of an answer that comes in pieces of `size`; `ends` closes the connection."""

    async def play() -> tuple[int, bytes]:
        body: list[bytes] = []
        exchange = Exchange(lambda data, time: body.append(data))
        transport = Transport()
        exchange.connection_made(transport)
        running = asyncio.ensure_future(exchange.run(b"GET / HTTP/1.1\r\n\r\n"))
        for begin in range(0, len(answer), size):
            exchange.data_received(answer[begin : begin + size])
        if ends:
            exchange.connection_lost(None)
        status = await running
        assert transport.ended or ends
        return status, b"".join(body)

    return asyncio.run(play())


CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n"
    b"5\r\nhello\r\nA;name=value\r\n, 10 bytes\r\n0\r\n\r\n"
)
COUNTED = b"HTTP/1.0 404 Not Found\r\nContent-Length: 4\r\n\r\nnone and more"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nall of it"
EMPTY = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "answer, ends, expected",
    [
        (CHUNKED, False, (200, b"hello, 10 bytes")),
        (COUNTED, False, (404, b"none")),
        (UNTIL_CLOSED, True, (200, b"all of it")),
        (EMPTY, False, (204, b"")),
    ],
)
def test_a_body_is_read_in_each_of_its_forms(answer, ends, expected, size):
    assert answered(answer, size, ends=ends) == expected


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"", "closed the connection early"),
        (b"HTTP/1.1 200 OK\r\n", "closed the connection early"),
        (CHUNKED[:-8], "closed the connection early"),
        (COUNTED[: COUNTED.index(b"none") + 2], "closed the connection early"),
        (b"SSH-2.0-server\r\n\r\n", "is not HTTP/1.1 .*SSH"),
        (b"HTTP/1.1 abc\r\n\r\n", "is not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "is not HTTP/1.1"),
    ],
)
def test_an_answer_that_is_cut_or_no_http_is_an_error(answer, message):
    with pytest.raises(ConnectionError, match=message):
        answered(answer, 1000, ends=True)
