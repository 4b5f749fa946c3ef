"""Pages of other origins: DNS rebinding, the Origin field, CORS for those that are allowed."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import Served, running_server
from tests.server.fake_engine import FakeEngine
from tests.server.test_http import CHAT, GET, HELLO, answers, error_of
from tpllm.server import ServerSettings, build_app
from tpllm.server.origins import host_name

GOOD = "https://good.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os,x-stainless-lang",
}
READ = ("/", "/health", "/v1/models", "/metrics", "/version", "/openapi.json", "/nothing")


# ---- the name by which a page calls the server -----------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "notlocalhost",
        "",
        "localhost@evil.example",
        "127.0.0.1:8000@evil.example",
        "[evil.example]",
        "[::1]evil.example",
        "[::",
        "*",
    ],
)
def test_a_foreign_name_reads_nothing(http: httpx.Client, host: str) -> None:
    for path in READ:
        error = error_of(http.get(path, headers={"host": host}), 403)
        assert error["code"] == "host_not_allowed" and "allowed_hosts" in error["message"]
        assert http.head(path, headers={"host": host}).status_code == 403
    error_of(http.post(CHAT, json=HELLO, headers={"host": host}), 403)
    error_of(http.options(CHAT, headers={"host": host, "origin": GOOD, **PREFLIGHT}), 403)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "localhost.",
        "app.localhost:3000",
        "127.0.0.1",
        "127.0.0.1:",
        "192.168.7.7:80",
        "[::1]",
        "[::1]:8000",
        "[FE80::1]:1",
    ],
)
def test_this_machine_and_addresses_are_let_in(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_request_has_one_host(served: Served) -> None:
    host = b"host: 127.0.0.1\r\n"
    assert answers(served, GET.replace(host, b"")) == [b"HTTP/1.1 400"]
    assert answers(served, GET.replace(host, host * 2)) == [b"HTTP/1.1 400"]
    assert answers(served, GET.replace(host, host + b"host: x\r\n")) == [b"HTTP/1.1 400"]
    # no browser speaks HTTP/1.0
    old = GET.replace(b"HTTP/1.1", b"HTTP/1.0")
    assert answers(served, old.replace(host, b"")) == [b"HTTP/1.1 200"]
    assert answers(served, old.replace(host, b"host: x\r\n")) == [b"HTTP/1.1 200"]


def statuses(hosts: list[str], **settings: Any) -> list[int]:
    """The statuses of a GET by each host name, with these settings."""

    async def ask() -> list[int]:
        engine: Any = FakeEngine()
        transport = httpx.ASGITransport(build_app(engine, ServerSettings(**settings)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            key = {"authorization": "Bearer k"}
            return [
                (await http.get("/v1/models", headers={**key, "host": host})).status_code
                for host in hosts
            ]

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [200, 200, 403, 403]),
        ({"allowed_hosts": ["LLM.corp"]}, [200, 200, 200, 403]),
        ({"allowed_hosts": ["*"]}, [200, 200, 200, 200]),
        ({"host": "localhost"}, [200, 200, 403, 403]),
        # others reach it, or need its key: no name is refused unless names are given
        ({"host": "0.0.0.0"}, [200, 200, 200, 200]),
        ({"host": "0.0.0.0", "allowed_hosts": ["llm.corp"]}, [200, 200, 200, 403]),
        ({"api_key": "k"}, [200, 200, 200, 200]),
        ({"api_key": "k", "allowed_hosts": ["llm.corp"]}, [200, 200, 200, 403]),
    ],
)
def test_which_names_are_refused_follows_from_the_settings(
    settings: dict[str, Any], expected: list[int]
) -> None:
    hosts = ["localhost:1", "10.0.0.1", "llm.CORP.:8000", "evil.example"]
    assert statuses(hosts, **settings) == expected


def test_a_page_under_an_allowed_name_may_use_the_server() -> None:
    with running_server(allowed_hosts=["llm.corp"]) as served, served.http() as http:
        own = {"host": "llm.corp:8000", "origin": "http://llm.corp:8000"}
        assert http.post(CHAT, json=HELLO, headers=own).status_code == 200
        foreign = {**own, "origin": "http://evil.example:8000"}
        error_of(http.post(CHAT, json=HELLO, headers=foreign), 403)


def test_the_name_in_a_host_field() -> None:
    assert host_name("A.example.:80") == "a.example"
    assert host_name("[2001:DB8::1]:80") == "2001:db8::1"
    assert host_name("a:b") is None and host_name("a b") is None and host_name(":80") is None


# ---- the Origin field ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin", ["http://evil.example:8000", "null", "http://127.0.0.1.evil.example", "http://[::"]
)
def test_a_foreign_page_is_kept_out(http: httpx.Client, origin: str) -> None:
    response = http.post(CHAT, json=HELLO, headers={"origin": origin})
    assert error_of(response, 403)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "http://localhost:3", "http://[::1]"])
def test_a_page_of_this_machine_may(http: httpx.Client, origin: str) -> None:
    response = http.post(CHAT, json=HELLO, headers={"origin": origin})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


# ---- CORS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_cors() -> Iterator[Served]:
    with running_server(api_key="s3cret", max_body_bytes=2000, cors_origins=[GOOD]) as served:
        yield served


def test_a_preflight_allows_what_openais_client_sends(with_cors: Served) -> None:
    with with_cors.http() as http:  # a preflight has no key
        good = http.options(CHAT, headers={"origin": GOOD, **PREFLIGHT})
        local = {"access-control-request-private-network": "true"}
        private = http.options(CHAT, headers={"origin": GOOD, **PREFLIGHT, **local})
    assert good.status_code == private.status_code == 200
    assert good.headers["access-control-allow-origin"] == GOOD
    assert good.headers["access-control-allow-methods"] == "GET, HEAD, POST"
    asked = PREFLIGHT["access-control-request-headers"]
    assert good.headers["access-control-allow-headers"] == asked
    assert "Origin" in good.headers["vary"] and good.headers["x-request-id"]
    assert private.headers["access-control-allow-private-network"] == "true"


def test_a_refused_preflight_has_openais_format(with_cors: Served) -> None:
    with with_cors.http() as http:
        evil = http.options(CHAT, headers={"origin": "https://evil.example", **PREFLIGHT})
        delete = {**PREFLIGHT, "access-control-request-method": "DELETE"}
        wrong = http.options(CHAT, headers={"origin": GOOD, **delete})
    assert error_of(evil, 403)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in evil.headers
    assert "'DELETE'" in error_of(wrong, 403)["message"]
    assert wrong.headers["access-control-allow-origin"] == GOOD


def test_every_answer_can_be_read_by_an_allowed_page(
    with_cors: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"authorization": "Bearer s3cret"}
    long = json.dumps({**HELLO, "user": "x" * 3000}).encode()
    chunks = (long[i : i + 500] for i in range(0, len(long), 500))
    json_type = {"content-type": "application/json"}
    with with_cors.http(headers={"origin": GOOD}) as http:
        got = [
            http.get("/v1/models"),
            http.get("/v1/models", headers=key),
            http.get("/nothing", headers=key),
            http.get(CHAT, headers=key),
            http.post(CHAT, headers={**key, **json_type}, content=b"{"),
            http.post(CHAT, headers={**key, **json_type}, content=long),
            http.post(CHAT, headers={**key, **json_type}, content=chunks),
            http.post(CHAT, headers=key, json={**HELLO, "stream": True}),
        ]
        monkeypatch.setattr(with_cors.engine, "config", None)
        got.append(http.get("/v1/models", headers=key))
    assert [each.status_code for each in got] == [401, 200, 404, 405, 400, 413, 413, 200, 500]
    for each in got:
        assert each.headers["access-control-allow-origin"] == GOOD
        assert "x-request-id" in each.headers["access-control-expose-headers"]
        if each.status_code >= 400:
            error_of(each, each.status_code)


def test_every_origin_may_be_allowed() -> None:
    with running_server(cors_origins=["*"]) as served, served.http() as http:
        anyone = {"origin": "https://any.example"}
        answer = http.post(CHAT, json=HELLO, headers=anyone)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert http.options(CHAT, headers={**anyone, **PREFLIGHT}).status_code == 200
        # this does not allow a page that has its own name for the server
        rebound = http.get("/v1/models", headers={**anyone, "host": "any.example"})
        assert error_of(rebound, 403)["code"] == "host_not_allowed"
