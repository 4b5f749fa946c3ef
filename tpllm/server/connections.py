"""Connections with limits that uvicorn lacks: on the size and the speed of a client's data."""

import fcntl
import sys
import termios
from asyncio import BaseTransport, TimerHandle
from enum import Enum
from typing import Any

from httptools import HttpRequestParser
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tpllm.server.errors import APIError
from tpllm.server.http10 import for_http10
from tpllm.server.incoming import Incoming
from tpllm.server.responses import AnswerNotTaken
from tpllm.server.service import new_id

MAX_HEAD_BYTES = 64 * 1024
MAX_FIELDS = 256  # of a head; each field takes memory beyond its bytes
MAX_DROPPED_BYTES = 64 * 2**20  # of a body after its answer, so that the client reads the answer
KEEP_ALIVE_S = 30  # usual clients close an idle connection after 5 s


class Part(Enum):
    """The part of a request that is read next."""

    HEAD = "head"
    BODY = "body"
    NOTHING = "nothing"  # the request is complete, and its answer is not


class TooLarge(Exception):
    """A head, or the trailers and chunk extensions of a body, exceed the limit of a head."""


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with further limits: see `limit`.

    One request at a time is parsed; data after it waits unparsed. Trailers of a chunked body are
    checked and dropped, since they do not count as headers (RFC 9110, section 6.5.1).
    """

    client_timeout_s: float

    @classmethod
    def limit(cls, client_timeout_s: float) -> type["Connection"]:
        """Return a class whose connections end in these cases.

        - The head of a request is larger than 64 KiB or has more than 256 fields.
        - The trailers of a body, or the extensions of a chunk, are larger than 64 KiB.
        - 64 MiB of a body have arrived after the request was answered.
        - A request is incomplete `client_timeout_s` after the connection was ready for it, or after
          it began.
        - The client has not read the data sent to it for `client_timeout_s`.
        """
        return type("LimitedConnection", (cls,), {"client_timeout_s": client_timeout_s})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._waiting = 0, 0.0  # (bytes to be sent, time since this number is unchanged)
        self._incoming = Incoming()
        self._next = Part.HEAD
        self._body_left: int | None = None  # by Content-Length; None for a chunked body
        self._num_head_bytes = 0
        self._num_trailer_bytes = 0
        self._num_silent_bytes = 0  # of a chunked body, since the parser last returned data of it
        self._num_dropped_bytes = 0
        self._is_too_large = False
        self._keeps_http10 = False
        self._application, self.app = self.app, self._answer

    # ---- reading -----------------------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        # a send waits until the kernel has all earlier data
        self.transport.set_write_buffer_limits(high=0)
        self._start_request_timer()

    def data_received(self, data: bytes) -> None:
        if self._request_timer is None and self._is_idle():
            self._start_request_timer()
        self._incoming.add(data)
        self._parse()

    def _parse(self) -> None:
        """Parse received data, up to the end of a request whose answer is incomplete."""
        while self._incoming and not self.transport.is_closing():
            if self._next is Part.NOTHING:
                self.flow.pause_reading()
                return
            try:
                piece = self._take()
            except TooLarge:
                self._refuse_size()
                return
            if not piece:
                return
            super().data_received(piece)
            if self._num_silent_bytes > MAX_HEAD_BYTES:
                self._refuse_size()

    def _take(self) -> bytes:
        """Return the next piece for the parser, or b"" if it needs more data.

        Raises:
            TooLarge: the head is too large.
        """
        if self._next is Part.HEAD:
            piece, size = self._incoming.take_head()
            self._num_head_bytes += size
            if self._num_head_bytes > MAX_HEAD_BYTES:
                raise TooLarge
            return piece
        if self._body_left is None:
            piece = self._incoming.take_chunks()
            self._num_silent_bytes += len(piece)
        else:
            piece = self._incoming.take(self._body_left)
            self._body_left -= len(piece)
        if self._is_idle():
            self._num_dropped_bytes += len(piece)
            if self._num_dropped_bytes > MAX_DROPPED_BYTES:
                self.transport.abort()
        return piece

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._request_timer is None:
            self._start_request_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._next is Part.HEAD:
            self._is_too_large = len(self.headers) >= MAX_FIELDS
        else:
            self._num_silent_bytes = 0
            self._num_trailer_bytes += len(name) + len(value) + len(b": \r\n")
            self._is_too_large = self._num_trailer_bytes > MAX_HEAD_BYTES
        if self._is_too_large:
            raise TooLarge  # the parser stops, and uvicorn calls send_400_response
        if self._next is Part.HEAD:
            super().on_header(name, value.rstrip(b" \t"))  # the parser strips its beginning alone

    def on_headers_complete(self) -> None:
        self._next = Part.BODY
        self._num_head_bytes = self._num_trailer_bytes = self._num_silent_bytes = 0
        self._num_dropped_bytes = 0
        # the parser has checked that it is a number
        length = next((value for name, value in self.headers if name == b"content-length"), None)
        self._body_left = None if length is None else int(length)
        if self.parser.get_http_version() < "1.1":
            self.expect_100_continue = False  # HTTP/1.0 has no 100 Continue
            self._keeps_http10 = self.parser.should_keep_alive()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._next = Part.HEAD if self._is_idle() else Part.NOTHING
        self._stop_request_timer()
        super().on_message_complete()
        # the old parser stops after a Connection: close, even in a trailer
        self.parser = HttpRequestParser(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._next is Part.NOTHING:
            self._next = Part.HEAD
        self._parse()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_request_timer(self) -> None:
        self._request_timer = self.loop.call_later(self.client_timeout_s, self._request_is_late)

    def _stop_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _request_is_late(self) -> None:
        self._request_timer = None
        if self._is_idle() and self._next is Part.HEAD:
            self._refuse(408, f"the request did not arrive within {self.client_timeout_s:g} s")
        else:
            self.transport.abort()

    # ---- answering ---------------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["http_version"] < "1.1":
            send = for_http10(self.cycle, send, self._keeps_http10)
        try:
            await self._application(scope, receive, send)
        except AnswerNotTaken:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self._is_too_large:
            self._refuse_size()
        else:
            self._refuse(400, "this is not a valid HTTP/1.1 request")

    def _refuse_size(self) -> None:
        self._refuse(
            431,
            "the head of the request, its trailers or its chunk extensions are larger than "
            f"{MAX_HEAD_BYTES} bytes or {MAX_FIELDS} fields",
        )

    def _refuse(self, status: int, message: str) -> None:
        """Send an error here, since no endpoint has a request to answer."""
        if self.transport.is_closing():
            return
        if self._is_idle():
            body = APIError(status, message).response().body
            head = (
                f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {new_id('req_')}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + bytes(body))
        self.transport.close()

    # ---- writing -----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """Start the write timer: the client reads more slowly than the server sends."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def abort_if_stalled(self, seconds: float) -> None:
        """End a connection whose client has read nothing for `seconds`; call it repeatedly."""
        waiting, now = self.num_waiting_bytes(), self.loop.time()
        if waiting == 0 or waiting != self._waiting[0]:
            self._waiting = waiting, now
        elif now - self._waiting[1] > seconds:
            self.transport.abort()

    def num_waiting_bytes(self) -> int:
        """Return the bytes that wait here and, if there are any, also those in the kernel."""
        ours = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket")
        if not ours or sock.fileno() < 0:
            return ours
        kernels = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return ours + int.from_bytes(kernels, sys.byteorder)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection; abort it if its client has not read the answer."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_request_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
