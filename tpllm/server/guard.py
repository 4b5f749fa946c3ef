"""Guard: refuse requests by host, origin, API key and size before an endpoint gets them."""

import asyncio
import hashlib
import hmac
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpllm.server.errors import APIError, unexpected_error
from tpllm.server.origins import check_host, check_origin
from tpllm.server.service import Service

logger = logging.getLogger("tpllm.server")

OPEN_PATHS = frozenset({"/", "/health"})  # the page has a field for the key; probes have no key
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
MAX_VALUES = 2**18  # in a body: parsing takes 0.1 to 0.3 s, in which all clients wait
LARGE_BODY = 2**16  # bytes; larger bodies are parsed one at a time, between other tasks
VALUE_BYTES = 64  # memory of a JSON value, at least
MAX_HELD_BYTES = 512 * 2**20  # for the bodies of all open requests


class Guard:
    """ASGI middleware around all endpoints: it checks host, origin, key, body size and the queue.

    The endpoint for GET handles HEAD; the HTTP server leaves out the body of its answer.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        key = service.settings.api_key
        self._key_digest = None if key is None else _digest(key.encode())
        self._turn_to_read = asyncio.Lock()
        self._held_bytes = 0  # memory of the bodies of open requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False
        num_bytes = num_values = 0  # of the body, so far

        async def receive_limited() -> Message:
            nonlocal num_bytes, num_values
            message = await receive()
            body: bytes = message.get("body", b"")
            # each JSON value follows one of these; those in strings count, too, but no prompt has
            # so many
            num_new = body.count(b",") + body.count(b"[") + body.count(b"{")
            num_bytes += len(body)
            num_values += num_new
            self._held_bytes += len(body) + VALUE_BYTES * num_new
            if num_bytes > self._service.settings.max_body_bytes:
                raise self._too_large()
            if num_values > MAX_VALUES:
                words = f"the body has more than {MAX_VALUES} values; send fewer at a time"
                raise APIError(413, words, code="body_too_large")
            if body:
                self._check_held_bytes()
            if num_bytes > LARGE_BODY and not message.get("more_body", False):
                async with self._turn_to_read:
                    await asyncio.sleep(0)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            self._check(scope)
            inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner, receive_limited, send_noted)
        except Exception as error:
            # Starlette's own response would lack the CORS headers
            if has_begun:
                raise
            if not isinstance(error, APIError):
                logger.error("a request failed", exc_info=error)
                error = unexpected_error()
            await error.response()(scope, receive, send)
        finally:
            self._held_bytes -= num_bytes + VALUE_BYTES * num_values

    def _check(self, scope: Scope) -> None:
        """Raise APIError if the head of a request is a reason to refuse it."""
        headers = Headers(scope=scope)
        path = scope["path"]
        settings = self._service.settings
        check_host(headers, scope["http_version"], settings)
        check_origin(headers, settings)
        scope["state"]["knows_key"] = knows_key = self._knows_key(headers)
        if path not in OPEN_PATHS and not knows_key:
            raise APIError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer ...",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > settings.max_body_bytes:
            raise self._too_large()
        self._check_held_bytes()
        if path in GENERATING_PATHS and scope["method"] == "POST":
            self._service.check_engine()  # before the body is read
            self._service.admission.check()

    def _knows_key(self, headers: Headers) -> bool:
        if self._key_digest is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # digests have equal lengths, so the time to compare does not reveal the key's length
        same = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key_digest)
        return same and scheme.lower() == "bearer"

    def _check_held_bytes(self) -> None:
        """Raise APIError 429 if many slow clients have sent too much, all bodies together."""
        limit = max(MAX_HELD_BYTES, 2 * self._service.settings.max_body_bytes)
        if self._held_bytes > limit:
            raise APIError(
                429,
                f"the open requests hold more than {limit} bytes; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _too_large(self) -> APIError:
        limit = self._service.settings.max_body_bytes
        return APIError(
            413,
            f"the body is larger than {limit} bytes, this server's limit",
            code="body_too_large",
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
