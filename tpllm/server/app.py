"""build_app: the endpoints, as a FastAPI application over an engine that runs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import tpllm
from tpllm.server import info
from tpllm.server.chat import answer_chat
from tpllm.server.completions import complete
from tpllm.server.engine import Engine
from tpllm.server.errors import APIError, from_validation
from tpllm.server.guard import Guard
from tpllm.server.page import page
from tpllm.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tpllm.server.responses import unexpected_error
from tpllm.server.service import Service
from tpllm.server.settings import ServerSettings

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def build_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application. Its `state.service` holds what the endpoints work with.

    It neither starts nor closes the engine. Limits on single connections are `serve`'s.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    settings = settings or ServerSettings()
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.prompts.close()

    # the pages that FastAPI has for its documentation load scripts from elsewhere
    app = FastAPI(
        title="tpllm",
        version=tpllm.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    _add_endpoints(app, service)
    _add_errors(app)
    app.add_middleware(Guard, service=service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _add_endpoints(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        return complete(service, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest) -> Response:
        return answer_chat(service, body)

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

    @app.get("/metrics")
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
    """Whatever goes wrong is told in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        body = BODIES.get(request.url.path)
        return from_validation(error.errors(), list(body.model_fields) if body else []).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, APIError):
            messages = {
                400: "the body cannot be read as JSON",
                404: f"there is no {request.url.path[:200]!r} here",
                405: f"{request.method} is not allowed here",
            }
            message = messages.get(error.status_code, str(error.detail))
            error = APIError(error.status_code, message, headers=error.headers)
        return error.response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return unexpected_error().response()  # uvicorn logs it
