"""A two-way connection between the engine's process and its caller's: plain data over a socket.

Each message is one MessagePack map (https://msgpack.org), one after the other without any framing
of our own, since each tells where it ends; there is no pickle. What the maps hold is in `messages`.
"""

import select
import socket
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any

import msgpack

Message = dict[str, Any]

_READ_BYTES = 1 << 20
_MAX_MESSAGE_BYTES = 2**31 - 1  # prompt log-probabilities of a long prompt: some MB


class Connection:
    """One end of the socket. Either side may be killed at any moment.

    `send` never waits: a thread writes, so that neither the steps of the engine nor the
    event loop of its caller ever wait for the other side. What waits to be written is bounded by
    the tokens that the running requests may have.
    """

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened
        self._poll = select.poll()
        self._poll.register(opened, select.POLLIN)
        self._unpacker = msgpack.Unpacker(
            strict_map_key=False, max_buffer_size=_MAX_MESSAGE_BYTES
        )  # keys are ints in a logit_bias
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._writer = Thread(
            target=_write, args=(opened, self._outbox), name="tpllm-connection", daemon=True
        )
        self._writer.start()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Have it written soon. What the other side's end prevents is dropped.

        Raises:
            ValueError, OverflowError: it holds what a message cannot; nothing is sent.
        """
        self._outbox.put(msgpack.packb(message))

    def receive(self, timeout_s: float) -> list[Message]:
        """The messages that have come; sleeps until there is one, for `timeout_s` at most.

        Raises:
            EOFError: the other side is gone, or `close` was called.
        """
        while self._poll.poll(timeout_s * 1000):
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError:  # reset by a side that was killed, or closed here
                data = b""
            if not data:
                raise EOFError("the other side of the connection is gone")
            self._unpacker.feed(data)
            if messages := list(self._unpacker):
                return messages
        return []

    def flush(self, timeout_s: float) -> None:
        """Write what is left, and end the sending direction. Nothing can be sent any more."""
        self._outbox.put(None)
        if current_thread() is not self._writer:
            self._writer.join(timeout_s)

    def close(self) -> None:
        """Let go of the socket at once; wakes a thread that waits in it."""
        with suppress(OSError):  # the other side may be gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self.flush(timeout_s=1.0)
        self._socket.close()


def _write(opened: socket.socket, outbox: "SimpleQueue[bytes | None]") -> None:
    """The writer's thread; it holds no `Connection`, so that one can be collected."""
    while True:
        messages = [outbox.get()]
        with suppress(Empty):
            while True:
                messages.append(outbox.get_nowait())
        data = b"".join([message for message in messages if message is not None])
        try:
            opened.sendall(data)
        except OSError:
            return
        if None in messages:
            return
