"""Incoming: the received bytes of a connection, divided where a head or a body ends."""

import re

# It ends a head and a chunked body. It may also occur within a chunked body, which does no harm.
BLANK_LINE = b"\r\n\r\n"
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
# The beginning of either pattern, at the end of the received bytes.
UNDECIDED = re.compile(rb"\r(\n(\r|u(p(g(r(a(de?)?)?)?)?)?)?)?\Z", re.IGNORECASE)
MAX_UNDECIDED = 9


class Incoming:
    """The bytes that a connection has received and not parsed.

    The HTTP parser does not report the sizes of heads and bodies. So no piece that it gets extends
    beyond the end of a head or a body, and the sizes can be counted.
    """

    def __init__(self) -> None:
        self._data = bytearray()

    def __bool__(self) -> bool:
        return bool(self._data)

    def add(self, data: bytes) -> None:
        self._data += data

    def take_head(self) -> tuple[bytes, int]:
        """Return a piece of a head and its original size; b"" if it needs more bytes.

        The field Upgrade is renamed. The server may ignore it (RFC 9110, section 7.8), but the
        parser would treat the body as another protocol: Java's client offers h2c in each request.
        """
        piece = self.take_chunks()
        return UPGRADE.sub(b"\r\nx-upgrade:", piece), len(piece)

    def take_chunks(self) -> bytes:
        """Return a piece of a chunked body; b"" if it needs more bytes."""
        end = self._data.find(BLANK_LINE)
        if end >= 0:
            return self.take(end + len(BLANK_LINE))
        undecided = UNDECIDED.search(self._data[-MAX_UNDECIDED:])
        return self.take(len(self._data) - (len(undecided[0]) if undecided else 0))

    def take(self, size: int) -> bytes:
        """Remove and return at most `size` bytes."""
        piece = bytes(self._data[:size])
        del self._data[:size]
        return piece
