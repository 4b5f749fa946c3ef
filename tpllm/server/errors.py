"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

import asyncio
import json
import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from tpllm.checks import short
from tpllm.errors import WorkerError, first_line
from tpllm.fields.validation import PROBLEMS
from tpllm.server.protocol import (
    LIST,
    OBJECT,
    TEXT_OR_LIST,
    TEXT_OR_OBJECT,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

logger = logging.getLogger("tpllm.server")

# Tags of alternatives, which pydantic adds to the path of an error: see protocol.py.
ALTERNATIVES = (TEXT_OR_LIST, LIST, TEXT_OR_OBJECT, OBJECT)
# Our messages for pydantic's errors about JSON values.
WORDS = PROBLEMS | {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_too_long": "is too long; at most {max_length} characters are allowed",
    "too_long": "has too many entries; at most {max_length} are allowed",
    "too_short": "has too few entries; give at least {min_length}",
}
# An error message that begins with one of these names is about that field.
FIELDS = frozenset(
    name
    for body in (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    for name in body.model_fields
)
TYPES = {429: "rate_limit_error"}  # OpenAI has "invalid_request_error" for 401 and 404, too


class APIError(HTTPException):
    """An error response: an HTTP status and OpenAI's error object.

    Attributes:
        message: whole sentences, for people
        param: the path of the wrong field; None for the request as a whole
        code: a name for programs, such as "context_length_exceeded"
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message = message
        self.param = param
        self.code = code

    @property
    def content(self) -> dict[str, Any]:
        kind = TYPES.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(
            to_json(self.content), self.status_code, self.headers, media_type="application/json"
        )


def invalid(message: str, param: str | None = None) -> APIError:
    """Return the error for a wrong request.

    Args:
        param: the path of the wrong field; by default, the field with which the message begins
    """
    return APIError(400, message, param=param or _blamed(message))


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def to_json(content: object) -> str:
    """Return compact JSON in ASCII, so that encoding never fails on a text of a request."""
    return _ENCODER.encode(content)


def context_exceeded(limit: int, what: str, param: str) -> APIError:
    """Return the error for a request beyond the model's context, with OpenAI's message and code.

    LiteLLM and pydantic-ai look for the beginning of the message, LangChain for the code or for
    "prompt is too long". They then shorten the history, or use another model.

    Args:
        limit: most tokens of a prompt and its answer
        what: what is too long, and how to shorten it
    """
    return APIError(
        400,
        f"This model's maximum context length is {limit} tokens. However, {what}.",
        param=param,
        code="context_length_exceeded",
    )


def from_value_error(error: ValueError, renamed: Mapping[str, str] | None = None) -> APIError:
    """Return the error for a ValueError of the engine, SamplingParams or the tokenizer.

    Args:
        renamed: the client's names of settings, where they differ
    """
    message = str(error)
    for ours, theirs in (renamed or {}).items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return invalid(message)


def _blamed(message: str) -> str | None:
    """Return the field with which a message begins: "stop" of "stop[0]=5", for example."""
    found = re.match(r"(?:the )?(([a-z_]+)(?:\[\w+\]|\.[a-z_]+)*)(=)?", message)
    return found[1] if found and (found[3] or found[2] in FIELDS) else None


def from_validation(problems: Sequence[Mapping[str, Any]], known: Sequence[str]) -> APIError:
    """Return the first of pydantic's errors in a request body, with our own message.

    Args:
        known: names of the request's fields, to suggest the nearest one
    """
    problem = problems[0]
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "json_invalid":
        why = context.get("error", "")
        return invalid(f"the body is not valid JSON: {why} (character {problem['loc'][-1]})")
    place = [part for part in problem["loc"] if part != "body" and part not in ALTERNATIVES]
    if kind == "string_unicode" and not place:
        return invalid("the name of a field is not valid Unicode; correct it")
    if kind == "value_error":
        message = str(context["error"])
        return invalid(message, _blamed(message) or _path(place) or None)
    if not place:
        return invalid("the body must be a JSON object, sent with Content-Type: application/json")
    param = _path(place)
    if kind == "missing":
        what = "every request needs it" if len(place) == 1 else "it is required there"
        return invalid(f"{param} is missing; {what}", param)
    if kind == "extra_forbidden":
        near = get_close_matches(param, known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else "leave it out"
        return invalid(f"there is no field {short(param)} here; {mend}", param)
    words = WORDS.get(kind, "is not valid; leave it out").format(**context)
    if kind == "string_type" and problem["loc"][-1] in ALTERNATIVES:
        words = f"must be {problem['loc'][-1].strip('()')}"
    return invalid(f"{param}={short(problem.get('input'))} {words}", param)


def _path(place: Sequence[object]) -> str:
    """Return "messages[0].content" for ("messages", 0, "content")."""
    text = ""
    for part in place:
        if isinstance(part, int) or not str(part).isidentifier():
            text += f"[{str(part)[:80]}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def as_api_error(error: BaseException) -> APIError:
    """Return the error response for any exception, and log unexpected ones."""
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
    """Return the error response for a bug of the server."""
    return APIError(500, "the server failed in an unexpected way; see its log")


def engine_failed(error: BaseException) -> APIError:
    """Return the error response for a failed engine, without the traceback, which is logged."""
    return APIError(503, f"the engine has failed: {first_line(error)}", code="engine_failed")
