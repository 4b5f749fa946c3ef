"""A two-way connection between the engine's process and its caller's: plain data over a socket.

Each message is one MessagePack map (https://msgpack.org). A map encodes its own length, so messages
follow each other without framing. There is no pickle. `messages` documents the maps.
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

    `send` never waits, because a thread writes. Neither the engine's steps nor the caller's event
    loop therefore wait for the other side. The tokens of the running requests bound the size of
    unwritten messages.
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
        """Queue a message for the writer's thread. It is dropped if the other side has ended.

        Raises:
            ValueError, OverflowError: the message holds a value that MessagePack cannot encode;
                nothing is sent.
        """
        self._outbox.put(msgpack.packb(message))

    def receive(self, timeout_s: float) -> list[Message]:
        """Sleep until messages come, for at most `timeout_s`, and return them.

        Raises:
            EOFError: the other side has ended, or `close` was called.
        """
        while self._poll.poll(timeout_s * 1000):
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError:  # the other side was killed, or this side is closed
                data = b""
            if not data:
                raise EOFError("the other side of the connection is gone")
            self._unpacker.feed(data)
            if messages := list(self._unpacker):
                return messages
        return []

    def flush(self, timeout_s: float) -> None:
        """Write all queued messages and end the writer's thread. Nothing can be sent afterwards."""
        self._outbox.put(None)
        if current_thread() is not self._writer:
            self._writer.join(timeout_s)

    def close(self) -> None:
        """Close the socket at once, and wake a thread that waits for it."""
        with suppress(OSError):  # the other side may have ended
            self._socket.shutdown(socket.SHUT_RDWR)
        self.flush(timeout_s=1.0)
        self._socket.close()


def _write(opened: socket.socket, outbox: "SimpleQueue[bytes | None]") -> None:
    """Run the writer's thread. It has no reference to the `Connection`, which can be collected."""
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
