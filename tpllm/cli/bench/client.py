"""A lean HTTP/1.1 client on asyncio, for many server-sent streams at once.

A general HTTP library spends several times as much on each piece of a stream (docs/cli.md has the
figures). At 256 streams it would need more than one CPU core, and measure itself. This one does the
least: one connection for each request, and a parser in C reads the bytes where they arrive.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

import tpllm

OnData = Callable[[bytes, float], None]  # bytes of the body, and when they came


@dataclass(frozen=True)
class Server:
    """Where an OpenAI-compatible server is.

    Attributes:
        url: "http://host:port", with or without a path and the "/v1" of OpenAI's clients
        api_key: sent as a bearer token; None for none

    Raises:
        ValueError: `url` is none.
    """

    url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number
            is_url = False
        if not is_url:
            raise ValueError(f"--base-url {self.url} must be of the form http://host:port")

    @property
    def root(self) -> str:
        """The path above /v1, where vLLM's and our own endpoints are."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")

    async def connect(self, on_data: OnData | None = None) -> "Exchange":
        """Open the connection for one request.

        Raises:
            OSError: no server answers.
        """
        parts = urlsplit(self.url)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        loop = asyncio.get_running_loop()
        assert parts.hostname is not None
        try:
            _, exchange = await loop.create_connection(
                lambda: Exchange(on_data), parts.hostname, port, ssl=tls
            )
        except OSError as error:
            raise ConnectionError(f"no server answers at {self.url} ({error})") from error
        return exchange

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """Return the bytes of a request; `path` begins below `root`."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {self.root}{path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc.rpartition('@')[2]}",
            f"User-Agent: tpllm/{tpllm.__version__}",
            "Connection: close",
            f"Content-Length: {len(content)}",
        ]
        if body is not None:
            lines.append("Content-Type: application/json")
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON that answers a request which is not streamed.

        Raises:
            OSError: no server answers, or the answer is not HTTP and JSON.
            HTTPStatusError: the status is not 200.
        """
        collected: list[bytes] = []
        exchange = await self.connect(lambda data, _: collected.append(data))
        try:
            status = await exchange.run(self.request(method, path, body))
        finally:
            exchange.close()
        content = b"".join(collected)
        if status != 200:
            raise HTTPStatusError(path, status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise OSError(f"{path} of {self.url} answers something other than JSON") from None


class HTTPStatusError(OSError):
    """An answer other than 200.

    Attributes:
        status: the number
    """

    def __init__(self, path: str, status: int, content: bytes) -> None:
        words = " ".join(content.decode(errors="replace").split())[:300]
        super().__init__(f"{path} answers with HTTP {status}: {words}")
        self.status = status


class Exchange(asyncio.Protocol):
    """One request and its answer, on a connection of its own.

    `on_data(bytes, time)` gets the body as it comes, without the frames of chunked encoding, and
    the value of time.perf_counter() at which the bytes were read.
    """

    def __init__(self, on_data: OnData | None) -> None:
        self._on_data = on_data
        self._parser = HttpResponseParser(self)
        self._now = 0.0  # when the newest bytes were read
        self._status: int | None = None
        self._has_end = False  # whether the head says where the body ends
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, request: bytes) -> int:
        """Send the request, wait for the whole body, and return the status.

        Raises:
            OSError: the connection ended too early, or the answer is not HTTP.
        """
        assert self._transport is not None
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio calls these -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._done.done():
            return
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._fail(f"the server's answer is not HTTP/1.1 ({error}: {data[:40]!r})")

    def connection_lost(self, error: Exception | None) -> None:
        if self._status is not None and not self._has_end:  # the body ends with its connection
            self.on_message_complete()
        else:
            self._fail(f"the server closed the connection early ({error or 'no reason given'})")

    def _fail(self, message: str) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(message))
        self.close()

    # ---- the parser calls these --------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_end |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._on_data is not None and not self._done.done():
            self._on_data(data, self._now)

    def on_message_complete(self) -> None:
        if not self._done.done():
            assert self._status is not None
            self._done.set_result(self._status)
        self.close()
