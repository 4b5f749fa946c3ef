"""Answers that take their time: ended when the client hangs up, in time, or with the server."""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpllm.errors import WorkerError
from tpllm.server.errors import APIError, from_value_error
from tpllm.server.json_turns import to_json_in_turns

if TYPE_CHECKING:
    from tpllm.server.service import Service

logger = logging.getLogger("tpllm.server")

# A streamed answer's status goes out with its first event, so that what is refused until then has a
# status of its own; or after this time, so that proxies see that somebody is at work.
HEADERS_AFTER_S = 10.0
LAST_EVENT_S = 2.0  # for a client to take in what went wrong, in the middle of a stream
COMMENT_AFTER_S = 15.0  # without an event, a comment tells proxies that the connection lives

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGone(Exception):
    """The client has hung up: there is nobody to answer."""


class AnswerNotTaken(Exception):
    """The client takes an answer in so slowly that the request's time is over: hang up."""


class LongResponse(Response):
    """Base of answers whose work begins when they are sent, watched until the client has them."""

    def __init__(self, service: "Service", answerer: "Answerer") -> None:
        super().__init__()
        self._service = service
        self._answerer = answerer
        self._deadline_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._deadline_s = loop.time() + self._service.settings.request_timeout_s
        try:
            # until the last byte has left, for its memory is needed as long
            with self._service.admission.enter(self._answerer.num_seqs):
                await self._answer(scope, receive, send)
        except APIError as error:
            await error.response()(scope, receive, send)

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    async def _watched(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled and awaited when it cannot be delivered.

        Raises:
            ClientGone: the client hung up.
            APIError: the time is over, the server ends, or whatever `work` raises, put into words.
        """
        timeout_s = self._deadline_s - asyncio.get_running_loop().time()
        task = asyncio.ensure_future(work)
        hang_up = asyncio.ensure_future(_hang_up(receive))
        try:
            with self._service.admission.ending(task):
                await asyncio.wait(
                    {task, hang_up}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
            if task.done():
                return _result(task)
            if hang_up.done():
                raise ClientGone
            raise APIError(
                504,
                f"the request took longer than {self._service.settings.request_timeout_s:g} s, "
                "this server's limit; ask for fewer tokens",
                code="timeout",
                headers={"x-should-retry": "false"},  # OpenAI's client would, twice
            )
        finally:
            task.cancel()
            hang_up.cancel()
            await asyncio.gather(task, hang_up, return_exceptions=True)


class JSONAnswer(LongResponse):
    """One JSON object, once it is whole."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pieces = await self._watched(receive, self._encoded())
        except ClientGone:
            scope["state"]["outcome"] = "client_gone"
            return
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        headers = [
            (b"content-length", str(sum(map(len, pieces))).encode()),
            (b"content-type", b"application/json"),
        ]
        try:
            async with asyncio.timeout_at(self._deadline_s):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                # waits until the last piece has left
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            scope["state"]["outcome"] = "timeout"
            raise AnswerNotTaken from None

    async def _encoded(self) -> list[bytes]:
        return await to_json_in_turns(await self._answerer.whole())


class EventStream(LongResponse):
    """Server-sent events, as OpenAI streams them: JSON objects, then [DONE]."""

    def __init__(self, service: "Service", answerer: "Answerer") -> None:
        super().__init__(service, answerer)
        self._has_begun = False
        self._last_sent_s = 0.0

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        comments = asyncio.ensure_future(self._comment(send))
        try:
            await self._watched(receive, self._send_events(send))
        except ClientGone:
            scope["state"]["outcome"] = "client_gone"
            return
        except APIError as error:
            if not self._has_begun:
                await error.response()(scope, receive, send)
                return
            scope["state"]["outcome"] = "timeout" if error.status_code == 504 else "error"
            try:
                async with asyncio.timeout(LAST_EVENT_S):
                    await self._end(send, await _event(error.content))
            except TimeoutError:
                raise AnswerNotTaken from None
        finally:
            comments.cancel()
            await asyncio.gather(comments, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._answerer.stream()) as events:
            async for event in events:
                await self._send(send, await _event(event))
            await self._end(send)

    async def _end(self, send: Send, last: bytes = b"") -> None:
        await self._send(send, last + DONE)
        # waits until the last event has left
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """Tell the client now and then that the server is still there."""
        await asyncio.sleep(HEADERS_AFTER_S)
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() - self._last_sent_s >= COMMENT_AFTER_S:
                await self._send(send, b": waiting\n\n")
            await asyncio.sleep(COMMENT_AFTER_S)

    async def _send(self, send: Send, body: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),  # nginx would collect the events
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._last_sent_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})


class Answerer(Protocol):
    """A checked request, which can be answered in either form."""

    @property
    def num_seqs(self) -> int:
        """Sequences that it comes to: prompts times n."""
        ...

    async def whole(self) -> dict[str, Any]: ...

    def stream(self) -> AsyncGenerator[dict[str, Any], None]: ...


def respond(service: "Service", answerer: Answerer, streams: bool) -> LongResponse:
    """The form that the request asks for."""
    if streams:
        return EventStream(service, answerer)
    return JSONAnswer(service, answerer)


def in_words(error: BaseException) -> APIError:
    """What a client is told of whatever was raised. What only we can mend is logged."""
    match error:
        case APIError():
            return error
        case asyncio.CancelledError():
            return APIError(503, "the server is shutting down", code="shutting_down")
        case ValueError():
            return from_value_error(error)
        case WorkerError():
            return engine_failed(error)
    logger.error("a request failed", exc_info=error)
    return unexpected_error()


def unexpected_error() -> APIError:
    """What a client is told of a mistake of ours."""
    return APIError(500, "the server failed in an unexpected way; its log says more")


def engine_failed(error: BaseException) -> APIError:
    """A failed engine's first line: tracebacks are for the log, and not for clients."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return APIError(503, f"the engine has failed: {first}", code="engine_failed")


async def _event(content: dict[str, Any]) -> bytes:
    # in one piece: a comment must not come in between
    return b"".join([b"data: ", *await to_json_in_turns(content), b"\n\n"])


def _result(task: "asyncio.Future[T]") -> T:
    try:
        return task.result()
    except BaseException as error:  # a panic in Rust code is no Exception
        raise in_words(error) from error


async def _hang_up(receive: Receive) -> None:
    """Wait for the client to hang up. What it still sends is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass
