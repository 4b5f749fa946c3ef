"""Connections that do not wait forever: for a request's end, or for a client to read."""

import fcntl
import sys
import termios
from asyncio import BaseTransport, TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tpllm.server.errors import APIError

MAX_HEAD_BYTES = 64 * 1024
KEEP_ALIVE_S = 30  # more than the 5 s after which the usual clients give an idle connection up


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with three limits that it has not: see `limit`."""

    client_timeout_s: float

    @classmethod
    def limit(cls, client_timeout_s: float) -> type["Connection"]:
        """A class whose connections end when

        - the head of a request is larger than 64 KiB,
        - a request has not come completely `client_timeout_s` after the connection was ready for
          it, or after it began,
        - the client has taken in nothing to speak of for `client_timeout_s` while an answer waits.
        """
        return type("LimitedConnection", (cls,), {"client_timeout_s": client_timeout_s})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._waiting = 0, 0.0  # bytes to be sent, and since when so many
        self._head_bytes = 0
        self._in_head = True

    # ---- reading -----------------------------------------------------------------------------

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._start_request_timer()

    def data_received(self, data: bytes) -> None:
        if self._request_timer is None and self._is_idle():
            self._start_request_timer()
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._request_timer is None:
            self._start_request_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._stop_request_timer()
        super().on_message_complete()

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
        if self._is_idle():
            self._refuse(
                408, f"the request has not come within {self.client_timeout_s:g} s", abort=True
            )
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a valid HTTP/1.1 request")

    def _refuse(self, status: int, message: str, abort: bool = False) -> None:
        """Answer by ourselves, there being no request that an endpoint could answer."""
        if self.transport.is_closing():
            return
        if self._is_idle():
            body = APIError(status, message).response().body
            head = (
                f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + bytes(body))
        self.transport.close()

    # ---- writing -----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """More waits to be sent than the client takes in."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def abort_if_stalled(self, seconds: float) -> None:
        """End a connection whose client has taken nothing in for so long; call it repeatedly."""
        waiting, now = self.num_waiting_bytes(), self.loop.time()
        if waiting == 0 or waiting != self._waiting[0]:
            self._waiting = waiting, now
        elif now - self._waiting[1] > seconds:
            self.transport.abort()

    def num_waiting_bytes(self) -> int:
        """Bytes that the client has not taken in, the kernel's included, while there are ours."""
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
        """An idle connection ends; one that still has an answer to deliver has had its time."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_request_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
