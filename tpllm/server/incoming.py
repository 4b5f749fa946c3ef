"""Incoming: the bytes of a connection, cut where a head or a body ends."""

import re

# Both end so, and nothing before their end may look so: a body in chunks may, which does no harm.
BLANK_LINE = b"\r\n\r\n"
UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
# The beginning of either, at the end of what has come.
UNDECIDED = re.compile(rb"\r(\n(\r|u(p(g(r(a(de?)?)?)?)?)?)?)?\Z", re.IGNORECASE)
MAX_UNDECIDED = 9


class Incoming:
    """What has come over a connection and has not been parsed.

    The parser of HTTP does not tell how many bytes belong to what. It is fed with pieces of which
    none goes beyond the end of a head or of a body, and so the sizes of both are known.
    """

    def __init__(self) -> None:
        self._data = bytearray()

    def __bool__(self) -> bool:
        return bool(self._data)

    def add(self, data: bytes) -> None:
        self._data += data

    def take_head(self) -> tuple[bytes, int]:
        """A piece of a head, and its size as it came; b"" while the next bytes decide.

        Upgrade is renamed. The server may ignore it (RFC 9110, section 7.8), but the parser would
        take the body for another protocol: Java's client asks for h2c in each of its requests.
        """
        piece = self.take_chunks()
        return UPGRADE.sub(b"\r\nx-upgrade:", piece), len(piece)

    def take_chunks(self) -> bytes:
        """A piece of a body in chunks; b"" while the next bytes decide."""
        end = self._data.find(BLANK_LINE)
        if end >= 0:
            return self.take(end + len(BLANK_LINE))
        undecided = UNDECIDED.search(self._data[-MAX_UNDECIDED:])
        return self.take(len(self._data) - (len(undecided[0]) if undecided else 0))

    def take(self, size: int) -> bytes:
        """At most `size` bytes."""
        piece = bytes(self._data[:size])
        del self._data[:size]
        return piece
