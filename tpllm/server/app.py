"""build_app: a FastAPI application with all endpoints, for a running engine."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

import tpllm
from tpllm.async_llm import AsyncLLM
from tpllm.server import info
from tpllm.server.chat import Chat
from tpllm.server.completions import Completion
from tpllm.server.errors import APIError, from_validation
from tpllm.server.guard import Guard
from tpllm.server.origins import Cors
from tpllm.server.page import page
from tpllm.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    TokenizeRequest,
)
from tpllm.server.request_log import RequestLog
from tpllm.server.responses import respond
from tpllm.server.service import Service
from tpllm.server.settings import ServerSettings

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


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


def _add_endpoints(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        return respond(service, Completion(service, body))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest) -> Response:
        return respond(service, Chat(service, body))

    @app.get("/v1/models")
    async def models() -> Response:
        return info.models(service)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return info.model(service, name)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return await info.tokenize(service, body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        return await info.detokenize(service, body)

    @app.get("/health")
    async def health(request: Request) -> Response:
        return await info.health(service, request.state.knows_key)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return await info.metrics(service)

    @app.get("/version")
    async def version() -> Response:
        return info.version()

    if service.settings.page:

        @app.get("/", include_in_schema=False)
        async def built_in_page() -> Response:
            return page()


def _add_errors(app: FastAPI) -> None:
    """Return all errors in OpenAI's format."""

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        body = BODIES.get(request.url.path)
        return from_validation(error.errors(), list(body.model_fields) if body else []).response()

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
