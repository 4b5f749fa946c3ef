"""serve and run: the application behind a socket, until a signal or the engine's end."""

import asyncio
import gc
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn

from tpllm.server.app import build_app
from tpllm.server.connections import KEEP_ALIVE_S, Connection
from tpllm.server.engine import Engine
from tpllm.server.service import Service
from tpllm.server.settings import ServerSettings

logger = logging.getLogger("tpllm.server")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENGINE_CHECK_S = 0.2
LAST_WORDS_S = 2  # for answers on their way when everything has ended
STALLED_S = 5.0  # after which a drain does not wait for a client that takes nothing in
BACKLOG = 4096
MAX_OPEN_FILES = 65536


def run(
    model: str | None, engine_settings: Mapping[str, Any], server_settings: ServerSettings
) -> int:
    """Start an engine and serve it until a signal: the whole of `tpllm serve`.

    The first SIGTERM or SIGINT refuses new requests with 503 and lets the running ones end, for
    `drain_timeout_s` at most; a second one ends everything at once.

    Args:
        model: as LLM's
        engine_settings: LLM's keywords

    Returns:
        The process's exit code: 0 after a drain, 1 if the engine failed, 128 + the signal's number
        after a second signal.

    Raises:
        ValueError, FileNotFoundError: a setting or file is wrong, or the port is taken.
        WorkerError: the engine failed to start.
    """
    from tpllm.async_llm import AsyncLLM

    _log_to_stderr()
    _allow_many_connections()
    with listening_socket(server_settings) as sock:
        engine = AsyncLLM(model, **engine_settings)
        # what is loaded stays: a full collection, which holds up every stream, would look through
        # its 380,000 objects each time, for a tenth of a second and more
        gc.freeze()
        return asyncio.run(_serve_and_close(engine, server_settings, sock))


async def _serve_and_close(engine: Engine, settings: ServerSettings, sock: socket.socket) -> int:
    with _signals(lambda number: None):  # that come when the server has ended change nothing
        try:
            return await serve(engine, settings, sock)
        finally:
            await engine.close()


async def serve(
    engine: Engine,
    settings: ServerSettings | None = None,
    sock: socket.socket | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve a running engine, which stays open, until a signal or `stop`.

    In the main thread the first SIGTERM or SIGINT drains, and a second one ends at once.

    Args:
        sock: bound by the caller, who closes it; None to bind `host` and `port`
        stop: set to drain and return, as by a signal

    Returns:
        As `run`.

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
        lifespan="off",  # what the application holds is closed below, however it ends
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WORDS_S,
    )
    service: Service = app.state.service
    try:
        return await _Serving(service, config, stop or asyncio.Event()).run(sock)
    finally:
        service.prompts.close()


@contextmanager
def listening_socket(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket bound to `host` and `port`, so that a taken port shows before a model is loaded.

    Raises:
        ValueError: the address is unknown, taken or not ours.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host!r} is no address ({error}); use '127.0.0.1'") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            raise ValueError(
                f"port={port} of host={host!r} cannot be had ({error.strerror}); stop the program "
                "that has it, or use another"
            ) from None
        yield sock


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are our affair: uvicorn would close the door at the first one."""
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
        # bound by us, and closed by us: uvicorn closes the one it gets
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
                await self._service.admission.wait_for_answers(LAST_WORDS_S)
        finally:
            if self._is_at_work():
                await self._abort_connections()
            self._server.should_exit = True
            if self._killed_by is not None:
                self._server.force_exit = True
            await server
            await self._abort_connections()  # that others have opened meanwhile
        if self._killed_by is not None:
            return 128 + self._killed_by
        return 0 if self._service.engine.dead_error is None else 1

    async def _abort_connections(self) -> None:
        for connection in self._connections():
            connection.transport.abort()
        await asyncio.sleep(0)  # for the sockets to be closed

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
                "host=%r lets other machines in and there is no api_key: whoever reaches the port "
                "may use the model",
                settings.host,
            )

    async def _until_stopped(self, server: "asyncio.Future[None]") -> None:
        while not self._stop.is_set() and not server.done():
            error = self._service.engine.dead_error
            if error is not None:
                logger.error("the engine has failed: %s", error)
                # each running request hears of it from the engine
                await self._service.admission.wait_for_answers(LAST_WORDS_S)
                return
            try:
                await asyncio.wait_for(self._stop.wait(), ENGINE_CHECK_S)
            except TimeoutError:
                continue

    async def _drain(self) -> None:
        """Take nothing new and let what runs end, unless a second signal comes."""
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
        """Whether answers are made, or wait for their clients to take them in."""
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
    """Call `handler` for each signal; only the main thread can hear them."""
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
    """One line for each event, where the program has not said otherwise."""
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _allow_many_connections() -> None:
    """Each connection is a descriptor, and the usual soft limit is 1,024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
