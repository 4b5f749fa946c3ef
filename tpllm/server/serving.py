"""serve and run: serve the application on a socket until a signal, or until the engine fails."""

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn

from tpllm.async_llm import AsyncLLM
from tpllm.config.resources import allow_many_connections
from tpllm.server.app import build_app
from tpllm.server.connections import KEEP_ALIVE_S, Connection
from tpllm.server.service import Service
from tpllm.server.settings import ServerSettings

logger = logging.getLogger("tpllm.server")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENGINE_CHECK_S = 0.2
LAST_ANSWERS_S = 2  # for answers that are being sent when the server ends
STALLED_S = 5.0  # after which a drain does not wait for a client that reads nothing
BACKLOG = 4096


def run(
    model: str | None, engine_settings: Mapping[str, Any], server_settings: ServerSettings
) -> int:
    """Start an engine and serve it until a signal, as `tpllm serve` does.

    After the first SIGTERM or SIGINT, new requests are refused with 503, and running ones may
    continue for `drain_timeout_s`. A second signal ends everything at once.

    Args:
        model: as in `LLM`
        engine_settings: keywords of `LLM`

    Returns:
        The process's exit code: 0 after a drain, 1 if the engine failed, 128 + the signal's number
        after a second signal.

    Raises:
        ValueError, FileNotFoundError: a setting or file is wrong, or the port is taken.
        WorkerError: the engine failed to start.
    """
    _log_to_stderr()
    allow_many_connections()
    with listening_socket(server_settings) as sock:
        engine = AsyncLLM(model, **engine_settings)
        # a full garbage collection would scan 380,000 loaded objects for more than 0.1 s, in
        # which no stream is served
        gc.freeze()
        return asyncio.run(_serve_and_close(engine, server_settings, sock))


async def _serve_and_close(engine: AsyncLLM, settings: ServerSettings, sock: socket.socket) -> int:
    with _signals(lambda number: None):  # signals after the server has ended have no effect
        try:
            return await serve(engine, settings, sock)
        finally:
            await engine.close()


async def serve(
    engine: AsyncLLM,
    settings: ServerSettings | None = None,
    sock: socket.socket | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve a running engine until a signal or `stop`, and leave the engine open.

    In the main thread, the first SIGTERM or SIGINT drains the server, and a second one ends it.

    Args:
        sock: a bound socket, which the caller closes; None to bind `host` and `port`
        stop: set it to drain and return, as after a signal

    Returns:
        The exit code, as in `run`.

    Raises:
        ValueError: a setting is wrong, or the port is taken.
    """
    settings = settings or ServerSettings()
    if sock is None:
        with listening_socket(settings) as own:
            return await serve(engine, settings, own, stop)
    app = build_app(engine, settings)
    config = uvicorn.Config(
        app,
        http=Connection.limit(settings.client_timeout_s),
        ws="none",
        lifespan="off",  # the application's resources are closed below in any case
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    service: Service = app.state.service
    try:
        return await _Serving(service, config, stop or asyncio.Event()).run(sock)
    finally:
        service.prompts.close()


@contextmanager
def listening_socket(settings: ServerSettings) -> Iterator[socket.socket]:
    """Return a socket bound to `host` and `port`. A used port fails before a model is loaded.

    Raises:
        ValueError: the address is unknown, used, or not of this machine.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host!r} is not an address ({error}); use '127.0.0.1'") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            raise ValueError(
                f"port={port} of host={host!r} cannot be bound ({error.strerror}); stop the "
                "program that uses it, or use another port"
            ) from None
        yield sock


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to this module: uvicorn would stop listening at the first one."""
        yield


class _Serving:
    """One run of the server, from its first to its last connection."""

    def __init__(self, service: Service, config: uvicorn.Config, stop: asyncio.Event) -> None:
        self._service = service
        self._server = _Uvicorn(config)
        self._stop = stop
        self._killed_by: int | None = None
        self._num_signals = 0

    async def run(self, sock: socket.socket) -> int:
        # a duplicate, because uvicorn closes the socket that it gets
        server = asyncio.ensure_future(self._server.serve(sockets=[sock.dup()]))
        try:
            with _signals(self._on_signal):
                await self._started(server)
                self._announce(sock)
                await self._until_stopped(server)
                if self._service.engine.dead_error is None:
                    await self._drain()
                self._service.admission.draining = True
                self._service.admission.end_all()
                await self._service.admission.wait_for_answers(LAST_ANSWERS_S)
        finally:
            if self._is_at_work():
                await self._abort_connections()
            self._server.should_exit = True
            if self._killed_by is not None:
                self._server.force_exit = True
            await server
            await self._abort_connections()  # those opened in the meantime
        if self._killed_by is not None:
            return 128 + self._killed_by
        return 0 if self._service.engine.dead_error is None else 1

    async def _abort_connections(self) -> None:
        for connection in self._connections():
            connection.transport.abort()
        await asyncio.sleep(0)  # lets the loop close the sockets

    def _connections(self) -> list[Connection]:
        return [c for c in self._server.server_state.connections if isinstance(c, Connection)]

    async def _started(self, server: "asyncio.Future[None]") -> None:
        while not self._server.started:
            if server.done():
                server.result()
                raise RuntimeError("the HTTP server ended before it began")
            await asyncio.sleep(0.01)

    def _announce(self, sock: socket.socket) -> None:
        settings = self._service.settings
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logger.info("http://%s:%d serves %s", shown, port, self._service.model_name)
        if settings.api_key is None and not settings.is_local:
            logger.warning(
                "host=%r accepts other machines and api_key is not set: anyone who reaches the "
                "port may use the model",
                settings.host,
            )

    async def _until_stopped(self, server: "asyncio.Future[None]") -> None:
        while not self._stop.is_set() and not server.done():
            error = self._service.engine.dead_error
            if error is not None:
                logger.error("the engine has failed: %s", error)
                # the engine has raised the error in every running request
                await self._service.admission.wait_for_answers(LAST_ANSWERS_S)
                return
            try:
                await asyncio.wait_for(self._stop.wait(), ENGINE_CHECK_S)
            except TimeoutError:
                continue

    async def _drain(self) -> None:
        """Refuse new requests and wait for running ones, until the timeout or a second signal."""
        admission, settings = self._service.admission, self._service.settings
        logger.info(
            "draining: %d requests have %g s to end; a second signal ends them now",
            admission.num_answers,
            settings.drain_timeout_s,
        )
        admission.draining = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + settings.drain_timeout_s
        while self._is_at_work() and self._killed_by is None:
            if loop.time() >= deadline:
                logger.warning("%d requests have not ended in time", admission.num_answers)
                break
            await asyncio.sleep(0.05)
            for connection in self._connections():
                connection.abort_if_stalled(STALLED_S)

    def _is_at_work(self) -> bool:
        """Whether answers are being generated, or wait for their clients to read them."""
        waiting = any(each.num_waiting_bytes() for each in self._connections())
        return waiting or self._service.admission.num_answers > 0

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._stop.set()
        else:
            self._killed_by = number


@contextmanager
def _signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` for each signal; only the main thread can receive them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _log_to_stderr() -> None:
    """Log one line per event, unless the program has configured logging."""
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
