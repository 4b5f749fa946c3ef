"""Answers to clients of HTTP/1.0, which knows no chunks: RFC 9112, section 6.1."""

from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def for_http10(cycle: RequestResponseCycle, send: Send, keep_alive: bool) -> Send:
    """`send`, for such a client. An answer without a length ends with the connection.

    Args:
        cycle: uvicorn's, of which `send` is
        keep_alive: whether the client asks for a connection that stays
    """
    has_length = False

    async def send_plain(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            headers = list(message["headers"])
            names = {name.lower() for name, _ in headers}
            has_length = b"content-length" in names
            if not has_length:
                cycle.chunked_encoding = False
            elif keep_alive and b"connection" not in names:
                cycle.keep_alive = True
                message = {**message, "headers": [*headers, (b"connection", b"keep-alive")]}
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain
