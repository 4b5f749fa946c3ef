"""Long-running responses, which end if the client disconnects, at a timeout, or at shutdown."""

import asyncio
from abc import abstractmethod
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tpllm.server.answerer import Answerer
from tpllm.server.errors import APIError, as_api_error
from tpllm.server.json_turns import to_json_in_turns
from tpllm.server.service import Service

# A stream's status is sent with its first event, so that an earlier error has its own status. After
# this time it is sent without an event, so that proxies do not close the connection.
HEADERS_AFTER_S = 10.0
LAST_EVENT_S = 2.0  # for a client to read an error within a stream
COMMENT_AFTER_S = 15.0  # without an event; a comment keeps proxies from closing the connection

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGone(Exception):
    """The client has disconnected."""


class AnswerNotTaken(Exception):
    """The client reads an answer so slowly that the request has timed out: disconnect."""


class LongResponse(Response):
    """Base class of responses whose work begins when they are sent.

    They are watched until the client has read them.
    """

    def __init__(self, service: Service, answerer: Answerer[Any]) -> None:
        super().__init__()
        self._service = service
        self._answerer = answerer
        self._deadline_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._deadline_s = loop.time() + self._service.settings.request_timeout_s
        try:
            # until the last byte is sent, since the answer takes memory until then
            with self._service.admission.enter(self._answerer.num_seqs):
                await self._answer(scope, receive, send)
        except ClientGone:
            scope["state"]["outcome"] = "client_gone"
        except APIError as error:
            await error.response()(scope, receive, send)

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer.

        Raises:
            ClientGone: the client disconnected.
            APIError: the request failed, and nothing has been sent.
        """

    async def _watched(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which is cancelled and awaited if it cannot be delivered.

        Raises:
            ClientGone: the client disconnected.
            APIError: the request timed out, the server is shutting down, or `work` failed.
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
                headers={"x-should-retry": "false"},  # OpenAI's client would retry twice
            )
        finally:
            task.cancel()
            hang_up.cancel()
            await asyncio.gather(task, hang_up, return_exceptions=True)


class JSONAnswer(LongResponse):
    """A response of one JSON object, sent once it is complete."""

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = await self._watched(receive, self._encoded())
        headers = [
            (b"content-length", str(sum(map(len, pieces))).encode()),
            (b"content-type", b"application/json"),
        ]
        try:
            async with asyncio.timeout_at(self._deadline_s):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                # this waits until the last piece is sent
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            scope["state"]["outcome"] = "timeout"
            raise AnswerNotTaken from None

    async def _encoded(self) -> list[bytes]:
        return await to_json_in_turns(await self._answerer.whole())


class EventStream(LongResponse):
    """A response of server-sent events in OpenAI's format: JSON objects, then [DONE]."""

    def __init__(self, service: Service, answerer: Answerer[Any]) -> None:
        super().__init__(service, answerer)
        self._has_begun = False
        self._last_sent_s = 0.0

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        comments = asyncio.ensure_future(self._comment(send))
        try:
            await self._watched(receive, self._send_events(send))
        except APIError as error:
            if not self._has_begun:
                raise
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
        # this waits until the last event is sent
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """Send comments between events, so that proxies do not close the connection."""
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
                (b"x-accel-buffering", b"no"),  # nginx would buffer the events
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._last_sent_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def respond(service: Service, answerer: Answerer[Any]) -> LongResponse:
    """Return a stream of events or one JSON object, as the request asks."""
    return (EventStream if answerer.streams else JSONAnswer)(service, answerer)


async def _event(content: dict[str, Any]) -> bytes:
    # one piece, so that no comment is sent within it
    return b"".join([b"data: ", *await to_json_in_turns(content), b"\n\n"])


def _result(task: "asyncio.Future[T]") -> T:
    try:
        return task.result()
    except BaseException as error:  # a panic in Rust code is not an Exception
        raise as_api_error(error) from error


async def _hang_up(receive: Receive) -> None:
    """Wait until the client disconnects, and drop data that it still sends."""
    while (await receive())["type"] != "http.disconnect":
        pass
