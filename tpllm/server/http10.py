"""Responses for HTTP/1.0 clients, which do not support chunks: RFC 9112, section 6.1."""

from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def for_http10(cycle: RequestResponseCycle, send: Send, keep_alive: bool) -> Send:
    """Return a `send` without chunks. The end of the connection ends an answer without a length.

    Args:
        cycle: uvicorn's cycle of the request, which owns `send`
        keep_alive: whether the client requests a persistent connection
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
