"""Which web pages may use the server: checks of the host name and the origin, and CORS."""

import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from tpllm.checks import short
from tpllm.server.errors import APIError, invalid
from tpllm.server.settings import ServerSettings, address_of, is_local_host

METHODS = ("GET", "HEAD", "POST")
READABLE = ("x-request-id", "retry-after", "x-should-retry")  # by a page, besides the usual ones

# An address in brackets or a name, and a port.
HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s\[\]:@/]+))(?::\d*)?")


class Cors(CORSMiddleware):
    """CORS for pages of `origins`. They may send any header, as OpenAI's client does."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],  # Starlette allows every header that the browser requests
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
            error = APIError(403, f"pages may not use the method {method}")
        else:
            error = origin_refused(origin)
        refusal = error.response()
        for name in set(response.headers) - set(refusal.headers):
            refusal.headers[name] = response.headers[name]
        return refusal


def check_host(headers: Headers, http_version: str, settings: ServerSettings) -> None:
    """Refuse a page whose host name was pointed to this machine's address (DNS rebinding).

    For the browser, such a page has the same origin as the server, and may read everything. Only
    the host name in its requests differs from the built-in page's. An IP address cannot be
    rebound. A key, which the page does not have, protects as well.

    Raises:
        APIError: 400, there is not exactly one Host field; 403, the name is not allowed.
    """
    hosts = headers.getlist("host")
    is_old = http_version < "1.1"  # proxies and probes use HTTP/1.0, but no browser does
    if len(hosts) > 1 or not (hosts or is_old):
        raise invalid(f"the request has {len(hosts)} Host fields; send exactly one")
    allowed = settings.allowed_hosts
    is_open = settings.is_local and settings.api_key is None
    if is_old or "*" in allowed or not (allowed or is_open):
        return
    name = host_name(hosts[0])
    if name is None or not (is_local_host(name) or address_of(name) or name in allowed):
        raise APIError(
            403,
            f"the host name {short(hosts[0])} is not allowed; add it to allowed_hosts, or use "
            "localhost or an IP address",
            code="host_not_allowed",
        )


def check_origin(headers: Headers, settings: ServerSettings) -> None:
    """Raise APIError 403 for pages of other origins if the server is local and has no key."""
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
        f"pages of {short(origin)} may not use this server; add it to cors_origins, or set api_key",
        code="origin_not_allowed",
    )


def host_name(host: str) -> str | None:
    """Return the name or address of a Host field in lower case; None if the field is invalid."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).lower().removesuffix(".") if found else None


def _origin_name(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:  # for example an invalid IPv6 address
        return None
