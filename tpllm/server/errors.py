"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from tpllm.checks import short

# What pydantic puts into the place of a problem besides names of fields: see protocol.py.
ALTERNATIVES = ("(text)", "(list)", "(object)")
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(HTTPException):
    """What a client is told, and under which status.

    Attributes:
        message: whole sentences, for people
        param: the field of the request that is to blame; None for the request as a whole
        code: for programs, such as "context_length_exceeded"
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


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def to_json(content: object) -> str:
    """Compact JSON. Only ASCII: no text of a request can make it fail to encode."""
    return _ENCODER.encode(content)


def from_value_error(error: ValueError) -> APIError:
    """A refusal by the engine or SamplingParams, which begins with the setting to blame."""
    message = str(error)
    blamed = re.match(r"([a-z_]+)(\[.*?\])?=", message)
    return APIError(400, message, param=blamed[1] if blamed else None)


def from_validation(problems: Sequence[Mapping[str, Any]], known: Sequence[str]) -> APIError:
    """The first of pydantic's problems with a request body, as one sentence.

    Args:
        known: names of the request's fields, to suggest the nearest one
    """
    problem = problems[0]
    kind, message = problem["type"], problem["msg"]
    if kind == "json_invalid":
        why = problem.get("ctx", {}).get("error", "")
        return APIError(400, f"the body is not valid JSON: {why} (character {problem['loc'][-1]})")
    place = [part for part in problem["loc"] if part != "body" and part not in ALTERNATIVES]
    if kind == "string_unicode":
        return APIError(400, "the name of a field is not valid Unicode; mend it")
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return APIError(400, message, param=_path(place) or None)
    if not place:
        return APIError(
            400, "the body must be a JSON object, sent with Content-Type: application/json"
        )
    param = _path(place)
    if kind == "missing":
        return APIError(400, f"{param} is missing; every such request needs it", param=param)
    if kind == "extra_forbidden":
        name = str(place[-1])
        near = get_close_matches(name, known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else "leave it out"
        return APIError(400, f"there is no field {short(name)} here; {mend}", param=param)
    value = short(problem.get("input"))
    if message.startswith("Input should be "):
        message = f"must be {message.removeprefix('Input should be ')}"
    else:
        message = f"is refused: {message[0].lower()}{message[1:]}"
    return APIError(400, f"{param}={value} {message}", param=param)


def _path(place: Sequence[object]) -> str:
    """messages[0].content, from ("messages", 0, "content")."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
