"""Which web pages may use the server: by the name they call it, by their origin, and by CORS."""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from tpllm.checks import short
from tpllm.server.errors import APIError
from tpllm.server.settings import ServerSettings, is_local_host

METHODS = ("GET", "HEAD", "POST")
READABLE = ("x-request-id", "retry-after", "x-should-retry")  # by a page, besides the usual ones

# An address in brackets or a name, and a port.
HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s\[\]:@/]+))(?::\d*)?")


class Cors(CORSMiddleware):
    """CORS for pages of `origins`, which may send any header: OpenAI's client sends its own."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],  # gives back those that the browser asks for
            allow_private_network=True,
            expose_headers=READABLE,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin = request_headers["origin"]
        if self.is_allowed_origin(origin):
            method = short(request_headers["access-control-request-method"])
            error = APIError(403, f"pages may not use the method {method} here")
        else:
            error = origin_refused(origin)
        refusal = error.response()
        for name in set(response.headers) - set(refusal.headers):
            refusal.headers[name] = response.headers[name]
        return refusal


def check_host(headers: Headers, http_version: str, settings: ServerSettings) -> None:
    """Keep out a page whose host name has been turned to this machine's address (DNS rebinding).

    In its browser's eyes such a page is of one origin with the server, and may read everything:
    only the name that it calls tells it from the built-in page. An address cannot be turned, and a
    key that the page does not know keeps it out as well.

    Raises:
        APIError: 400, or 403.
    """
    hosts = headers.getlist("host")
    is_old = http_version < "1.1"  # no browser speaks HTTP/1.0; proxies and probes do
    if len(hosts) > 1 or not (hosts or is_old):
        raise APIError(400, f"a request has one Host field, and this one has {len(hosts)}")
    allowed = settings.allowed_hosts
    is_open = settings.is_local and settings.api_key is None
    if is_old or "*" in allowed or not (allowed or is_open):
        return
    name = host_name(hosts[0])
    if name is None or not (is_local_host(name) or _is_address(name) or name in allowed):
        raise APIError(
            403,
            f"this server does not go by the name {short(hosts[0])}; add the name to "
            "allowed_hosts, or use localhost or an IP address",
            code="host_not_allowed",
        )


def check_origin(headers: Headers, settings: ServerSettings) -> None:
    """Keep pages of other origins out where neither a key nor the network does.

    Raises:
        APIError: 403.
    """
    origin = headers.get("origin")
    if origin is None or settings.api_key is not None or not settings.is_local:
        return
    if "*" in settings.cors_origins or origin in settings.cors_origins:
        return
    name = _origin_name(origin)
    # the page's own host has passed check_host
    if name is None or not (is_local_host(name) or name == host_name(headers.get("host", ""))):
        raise origin_refused(origin)


def origin_refused(origin: str) -> APIError:
    return APIError(
        403,
        f"pages of {short(origin)} may not use this server; name it in cors_origins, or set "
        "an api_key",
        code="origin_not_allowed",
    )


def host_name(host: str) -> str | None:
    """The name or address in a Host field, in lower case; None where there is none."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).lower().removesuffix(".") if found else None


def _origin_name(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:  # such as a broken IPv6 address
        return None


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
