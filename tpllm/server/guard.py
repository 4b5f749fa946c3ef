"""The door: who has no key, or brings too much, gets no further. Everyone is counted."""

import asyncio
import hashlib
import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpllm.checks import short
from tpllm.server.errors import APIError
from tpllm.server.service import Service
from tpllm.server.settings import is_local_host

logger = logging.getLogger("tpllm.server")

OPEN_PATHS = frozenset({"/", "/health"})  # the page asks for the key itself; probes have none
GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
COUNTED_PATHS = GENERATING_PATHS | {"/v1/models", "/tokenize", "/detokenize"}
MAX_VALUES = 2**18  # of a body: 0.1 to 0.3 s to read, for which everybody waits
LARGE_BODY = 2**16  # bytes; such are read one by one, with turns for others in between
VALUE_BYTES = 64  # that a value takes in memory, at least
MAX_HELD_BYTES = 512 * 2**20  # for the bodies of all requests that are here


class Guard:
    """ASGI middleware around all endpoints: key, body limit, early refusal, counting, log line."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        key = service.settings.api_key
        self._key_digest = None if key is None else _digest(key.encode())
        self._turn_to_read = asyncio.Lock()
        self._held_bytes = 0  # for bodies, whole or not, of requests without a whole answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        state = scope.setdefault("state", {})
        state["outcome"] = None
        status = 0
        num_bytes = num_values = 0  # of the body, so far

        async def receive_limited() -> Message:
            nonlocal num_bytes, num_values
            message = await receive()
            body: bytes = message.get("body", b"")
            # each value of JSON comes after one of these; in texts they count in vain, but so
            # many are no prompt either
            num_new = body.count(b",") + body.count(b"[") + body.count(b"{")
            num_bytes += len(body)
            num_values += num_new
            self._held_bytes += len(body) + VALUE_BYTES * num_new
            if num_bytes > self._service.settings.max_body_bytes:
                raise self._too_large()
            if num_values > MAX_VALUES:
                words = f"the body holds more than {MAX_VALUES} values; send fewer at a time"
                raise APIError(413, words, code="body_too_large")
            if body:
                self._check_held_bytes()
            if num_bytes > LARGE_BODY and not message.get("more_body", False):
                async with self._turn_to_read:
                    await asyncio.sleep(0)
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            try:
                self._check(scope)
            except APIError as error:
                await error.response()(scope, receive, send_counted)
            else:
                await self._app(scope, receive_limited, send_counted)
        except Exception:
            state["outcome"] = "error"
            raise
        finally:
            self._held_bytes -= num_bytes + VALUE_BYTES * num_values
            self._tell(scope, status, 1000 * (time.perf_counter() - begin))

    def _tell(self, scope: Scope, status: int, ms: float) -> None:
        """Count a request that has been answered, and log it if that is wanted."""
        path = scope["path"]
        outcome = scope["state"]["outcome"] or _outcome(status)
        if path in COUNTED_PATHS:
            self._service.metrics.answered(path, outcome)
        if self._service.settings.log_requests:
            shown = path if path.isprintable() else repr(path)
            line = "method=%s path=%s status=%d outcome=%s ms=%.1f"
            logger.info(line, scope["method"], shown, status, outcome, ms)

    def _check(self, scope: Scope) -> None:
        """What can be refused by the head of a request.

        Raises:
            APIError
        """
        headers = Headers(scope=scope)
        path = scope["path"]
        self._check_origin(headers)
        scope["state"]["knows_key"] = knows_key = self._knows_key(headers)
        if path not in OPEN_PATHS and not knows_key:
            raise APIError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer ...",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._service.settings.max_body_bytes:
            raise self._too_large()
        self._check_held_bytes()
        if path in GENERATING_PATHS and scope["method"] == "POST":
            self._service.check_engine()  # and all before the body is read
            self._service.admission.check()

    def _check_origin(self, headers: Headers) -> None:
        """Keep foreign web pages out where neither a key nor the network does.

        A page whose host name has been turned to this machine's address is of one origin with the
        server in its browser's eyes: only what the name was tells it from the built-in page.

        Raises:
            APIError: 403.
        """
        settings = self._service.settings
        origin = headers.get("origin")
        if origin is None or settings.api_key is not None or not settings.is_local:
            return
        allowed = settings.cors_origins
        if "*" in allowed or origin in allowed or _is_local_origin(origin):
            return
        raise APIError(
            403,
            f"pages of {short(origin)} may not use this server; name it in cors_origins, or set "
            "an api_key",
            code="origin_not_allowed",
        )

    def _knows_key(self, headers: Headers) -> bool:
        if self._key_digest is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # digests have one length: the time to compare tells nothing, not even how long the key is
        same = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key_digest)
        return same and scheme.lower() == "bearer"

    def _check_held_bytes(self) -> None:
        """However many clients send however slowly, and never to the end: memory has its limit.

        Raises:
            APIError: 429.
        """
        limit = max(MAX_HELD_BYTES, 2 * self._service.settings.max_body_bytes)
        if self._held_bytes > limit:
            raise APIError(
                429,
                f"the requests that are here hold more than {limit} bytes; try again later",
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


def _is_local_origin(origin: str) -> bool:
    try:
        host = urlsplit(origin).hostname
    except ValueError:  # such as a broken IPv6 address
        return False
    return host is not None and is_local_host(host)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _outcome(status: int) -> str:
    if status == 429:
        return "overloaded"
    if status == 503:
        return "unavailable"
    if status == 504:
        return "timeout"
    if status >= 500:
        return "error"
    return "invalid" if status >= 400 else "ok"
