"""A server that listens on a free port of 127.0.0.1, in a thread of the tests' process."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from openai import DefaultHttpxClient, OpenAI

from tests.leaks import wait_until
from tests.server.fake_engine import FakeEngine
from tpllm.server import ServerSettings, serve
from tpllm.server.serving import listening_socket


class Served:
    """One server that runs, and the engine behind it."""

    def __init__(self, settings: ServerSettings, make_engine: Callable[[], Any]) -> None:
        self.settings = settings
        self._make_engine = make_engine
        self.exit_code: Future[int] = Future()
        self._ready = threading.Event()

    def run(self, sock: socket.socket) -> None:
        self.port = sock.getsockname()[1]
        try:
            self.exit_code.set_result(asyncio.run(self._run(sock)))
        except BaseException as error:
            self.exit_code.set_exception(error)
            self._ready.set()

    async def _run(self, sock: socket.socket) -> int:
        self.loop = asyncio.get_running_loop()
        self.stop = asyncio.Event()
        self.engine = self._make_engine()
        self._ready.set()
        try:
            return await serve(self.engine, self.settings, sock, self.stop)
        finally:
            await self.engine.close()

    def wait_until_it_answers(self) -> None:
        assert self._ready.wait(60)

        def answers() -> bool:
            if self.exit_code.done():
                self.exit_code.result()
            try:
                self.connect().close()
            except OSError:
                return False
            return True

        assert wait_until(answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, function: Callable[[], Any]) -> None:
        """Call in the server's thread, which owns asyncio's objects."""
        self.loop.call_soon_threadsafe(function)

    def hold(self) -> None:
        """Make every answer wait for `go_on`."""
        self.call(self.engine.hold.clear)

    def go_on(self) -> None:
        self.call(self.engine.hold.set)

    def http(self, **options: Any) -> httpx.Client:
        # verify=False: reading the certificates of TLS, which is not used, takes 0.2 s
        return httpx.Client(base_url=self.url, timeout=30, verify=False, **options)

    def openai(self, key: str = "none") -> OpenAI:
        http = DefaultHttpxClient(verify=False)
        url = f"{self.url}/v1"
        return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30, http_client=http)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def running_server(
    make_engine: Callable[[], Any] = FakeEngine, **settings: Any
) -> Iterator[Served]:
    served = Served(ServerSettings(port=0, **settings), make_engine)
    with listening_socket(served.settings) as sock:
        thread = threading.Thread(target=served.run, args=(sock,), name="tpllm-test-server")
        thread.start()
        try:
            served.wait_until_it_answers()
            yield served
        finally:
            if not served.exit_code.done():
                served.call(served.stop.set)
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    """A server with default settings, for tests that do not change it."""
    with running_server() as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """The shared server, with its engine reset."""
    engine = shared.engine
    engine.reply, engine.chars_per_step, engine.step_s = None, 3, 0.0
    engine.tokenizer.template_end = ""
    for log in (engine.seen, engine.gone, engine.tokenizer.rendered):
        log.clear()
    yield shared
    shared.go_on()
    assert wait_until(lambda: engine.num_running == 0)


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with served.openai() as client:
        yield client


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http() as http:
        yield http
