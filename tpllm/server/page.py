"""The built-in page: one file that loads nothing else and may only connect to this server."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import HTMLResponse


@cache
def _page() -> tuple[str, str]:
    """Return the page, and its Content-Security-Policy with the hashes of its script and style."""
    html = (files("tpllm.server") / "page" / "index.html").read_text()
    script, style = (_source(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _source(html: str, tag: str) -> str:
    found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} <{tag}>"
    digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
    return f"'sha256-{digest}'"


async def page() -> HTMLResponse:
    """GET /: the built-in page."""
    html, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)
