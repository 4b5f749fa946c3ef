"""RequestLog: gives every request an id, counts it, and logs it if `log_requests` is set."""

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpllm.server.guard import GENERATING_PATHS
from tpllm.server.service import Service, new_id

logger = logging.getLogger("tpllm.server")

COUNTED_PATHS = GENERATING_PATHS | {"/v1/models", "/tokenize", "/detokenize"}
REQUEST_ID = re.compile("[!-~]{1,128}")  # without spaces, which separate the fields of a log line
MAX_SHOWN = 200  # characters of a path


class RequestLog:
    """The outermost ASGI middleware.

    A response has the client's `x-request-id`, or a new one if the client's is missing or invalid.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        state = scope.setdefault("state", {})
        state["outcome"] = None
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = new_id("req_")
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            state["outcome"] = state["outcome"] or "error"
            raise
        finally:
            self._record(scope, status, request_id, 1000 * (time.perf_counter() - begin))

    def _record(self, scope: Scope, status: int, request_id: str, ms: float) -> None:
        path = scope["path"]
        outcome = scope["state"]["outcome"] or _outcome(status)
        if path in COUNTED_PATHS:
            self._service.metrics.requests.labels(path, outcome).inc()
        if self._service.settings.log_requests:
            shown = path[:MAX_SHOWN]
            shown = shown if shown.isprintable() else repr(shown)
            line = "method=%s path=%s status=%d outcome=%s ms=%.1f id=%s"
            logger.info(line, scope["method"], shown, status, outcome, ms, request_id)


def _outcome(status: int) -> str:
    usual = "ok" if status < 400 else "invalid" if status < 500 else "error"
    return {429: "overloaded", 503: "unavailable", 504: "timeout"}.get(status, usual)
