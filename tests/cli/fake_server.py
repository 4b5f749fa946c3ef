"""An OpenAI-compatible server that speaks in fixed words: for clients to be tested against."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Send = Callable[[bytes], Awaitable[None]]


@dataclass
class FakeServer:
    """What it does, and what it was asked.

    Attributes:
        first_s: how long the first token takes
        gap_s: how long each further one takes
        has_tokenize: whether it has /tokenize; a word is a token there
        counts_usage: whether the last event says how many tokens there were
        refuse: whether a request, counted from 0, is answered with 429
        break_off: whether a request is broken off after its first token
        api_key: what it wants to be sent
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    has_tokenize: bool = True
    counts_usage: bool = True
    refuse: Callable[[int], bool] = lambda number: False
    break_off: Callable[[int], bool] = lambda number: False
    api_key: str | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of completions
    most_at_once: int = 0
    _running: int = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
            content = await reader.readexactly(int(headers["Content-Length"]))
            path = head.split(" ")[1]
            if self.api_key and headers.get("Authorization") != f"Bearer {self.api_key}":
                writer.write(_answer(401, {"error": {"message": "no such key"}}))
            elif path == "/v1/models":
                writer.write(_answer(200, {"data": [{"id": "fake"}]}))
            elif path == "/tokenize" and self.has_tokenize:
                writer.write(_answer(200, {"count": len(json.loads(content)["prompt"].split())}))
            elif path in ("/v1/completions", "/v1/chat/completions"):
                await self._complete(json.loads(content), writer)
            else:
                writer.write(_answer(404, {"error": {"message": f"no {path}"}}))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        if self.refuse(number):
            writer.write(_answer(429, {"error": {"message": "too many"}}))
            return
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + _chunk(b": hello\n\n")
            )
            for i in range(body["max_tokens"]):
                await asyncio.sleep(self.gap_s if i else self.first_s)
                if i == 1 and self.break_off(number):
                    return
                text = {"text": " word"} if "prompt" in body else {"delta": {"content": " word"}}
                writer.write(_chunk(_event({"choices": [{"index": 0, **text}]})))
                await writer.drain()
            if self.counts_usage:
                prompt = body.get("prompt") or body["messages"][0]["content"]
                usage = {
                    "prompt_tokens": len(prompt.split()),
                    "completion_tokens": body["max_tokens"],
                }
                writer.write(_chunk(_event({"choices": [], "usage": usage})))
            writer.write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))
        finally:
            self._running -= 1


@contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Run it in a thread of its own, on a free port of this machine."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        listening = await asyncio.start_server(server.connected, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        async with listening:
            await stop.wait()  # whoever still waits then is cancelled by asyncio.run

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, stop = started.result(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def _answer(status: int, content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    return f"HTTP/1.1 {status} Words\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
