"""build_app: a FastAPI application with all endpoints, for a running engine."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from inspect import getdoc, signature
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

import tpllm
from tpllm.async_llm import AsyncLLM
from tpllm.server import info
from tpllm.server.chat import Chat
from tpllm.server.completions import Completion
from tpllm.server.errors import APIError, from_validation
from tpllm.server.guard import Guard
from tpllm.server.origins import Cors
from tpllm.server.page import page
from tpllm.server.protocol import ChatCompletionRequest, CompletionRequest, ErrorBody
from tpllm.server.request_log import RequestLog
from tpllm.server.responses import respond
from tpllm.server.service import Service
from tpllm.server.settings import ServerSettings

# The errors of all endpoints, for the OpenAPI document: see docs/server.md.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "the request is wrong",
        401: "the API key is missing or wrong",
        403: "a page of another origin, or another host name, is not allowed",
        404: "there is no such model or path",
        405: "the path does not take this method",
        413: "the body is too large",
        429: "the queue is full",
        500: "a bug of the server",
        503: "the engine has failed, or the server is shutting down",
        504: "the request took too long",
    }.items()
}


def build_app(engine: AsyncLLM, settings: ServerSettings | None = None) -> FastAPI:
    """Return the application. Its `state.service` is the Service that the endpoints use.

    The application neither starts nor closes the engine, and does not limit connections; `serve`
    limits them.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    settings = settings or ServerSettings()
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.prompts.close()

    # without FastAPI's documentation pages, which load scripts from other sites
    app = FastAPI(
        title="tpllm",
        version=tpllm.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    _document_our_errors(app)
    app.state.service = service
    _add_endpoints(app, service)
    _add_errors(app)
    app.add_middleware(Guard, service=service)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=tuple(settings.cors_origins))
    app.add_middleware(RequestLog, service=service)
    return app


def _document_our_errors(app: FastAPI) -> None:
    """Remove FastAPI's status 422 from the OpenAPI document; a wrong body is 400, as at OpenAI."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def completions(service: Service, body: CompletionRequest) -> Response:
    """Continue one or many prompts, as at OpenAI."""
    return respond(service, Completion(service, body))


async def chat_completions(service: Service, body: ChatCompletionRequest) -> Response:
    """Answer a conversation, as at OpenAI."""
    return respond(service, Chat(service, body))


ENDPOINTS: tuple[tuple[str, str, Callable[..., Awaitable[Response]]], ...] = (
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat_completions),
    ("GET", "/v1/models", info.models),
    ("GET", "/v1/models/{name:path}", info.model),
    ("POST", "/tokenize", info.tokenize),
    ("POST", "/detokenize", info.detokenize),
    ("GET", "/health", info.health),
    ("GET", "/metrics", info.metrics),
    ("GET", "/version", info.version),
)


def _add_endpoints(app: FastAPI, service: Service) -> None:
    for method, path, endpoint in ENDPOINTS:
        app.add_api_route(
            path,
            partial(endpoint, service),
            methods=[method],
            name=endpoint.__name__,
            description=getdoc(endpoint),
            response_class=PlainTextResponse if endpoint is info.metrics else JSONResponse,
        )
    if service.settings.page:
        app.add_api_route("/", page, include_in_schema=False)


def _add_errors(app: FastAPI) -> None:
    """Return all errors in OpenAI's format."""

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        body = signature(request.scope["endpoint"]).parameters["body"].annotation
        return from_validation(error.errors(), list(body.model_fields)).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, APIError):
            messages = {
                400: "the body cannot be read as JSON",
                404: f"the path {request.url.path[:200]!r} does not exist",
                405: f"{request.method} is not allowed for this path",
            }
            message = messages.get(error.status_code, str(error.detail))
            error = APIError(error.status_code, message, headers=_with_head(error.headers))
        return error.response()


def _with_head(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers of a refused method, with HEAD wherever GET is allowed."""
    return {
        name: f"{value}, HEAD" if name.lower() == "allow" and value == "GET" else value
        for name, value in (headers or {}).items()
    }
