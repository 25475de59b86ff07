"""The application: which path is answered by what."""

import logging
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_cli.errors import TealError
from teal_cli.serve.chat import chat
from teal_cli.serve.completions import completions
from teal_cli.serve.connection import ClientLeftError, read_body
from teal_cli.serve.errors import ApiError, as_api_error, invalid_request
from teal_cli.serve.guard import Guard
from teal_cli.serve.schemas import ChatRequest, CompletionRequest
from teal_cli.serve.service import Service

log = logging.getLogger(__name__)
R = TypeVar("R", bound=BaseModel)
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
Answer = Callable[[Request, R, Service], Awaitable[Response]]
_CLIENT_LEFT = 499
"""As nginx says it; nobody reads it but the metrics."""


def create_app(service: Service, *, key: str | None = None) -> FastAPI:
    """The application on a service, which somebody else starts and stops.

    Args:
        service: the model.
        key: that requests must carry; None for none.
    """
    config = service.config
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(
        title="teal",
        openapi_url=None,
        middleware=[Middleware(Guard, hosts=config.allowed_hosts, key=key, metrics=service.metrics)],
        redirect_slashes=False,
    )

    async def posted(http: Request, kind: type[R], answer: Answer[R]) -> Response:
        try:
            body = await read_body(http, config.max_body_bytes)
            return await answer(http, parsed(kind, body), service)
        except ClientLeftError:
            return Response(status_code=_CLIENT_LEFT)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await posted(http, ChatRequest, chat)

    @app.post("/v1/completions")
    async def text_completions(http: Request) -> Response:
        return await posted(http, CompletionRequest, completions)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.served.name:
            raise ApiError(404, f"there is no model {name[:100]!r} here", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    @app.get("/health")
    async def health() -> Response:
        state = "ready" if service.is_ready else "not ready"
        return JSONResponse({"status": state}, 200 if service.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _serve_page(app)
    _answer_errors(app)
    return app


def parsed(kind: type[R], body: bytes) -> R:
    """A request, checked.

    Raises:
        ApiError: what is wrong with it.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        known = [field.alias or name for name, field in kind.model_fields.items()]
        raise invalid_request(error.errors(include_url=False, include_input=False), known) from error


def _model(service: Service) -> dict[str, Any]:
    served = service.served
    made = {"id": served.name, "object": "model", "created": service.created, "owned_by": "teal"}
    return {**made, "teal": served.describe()}


def _serve_page(app: FastAPI) -> None:
    folder = files("teal_cli.serve") / "page"
    for path, (name, media_type) in _PAGE.items():
        app.add_route(path, _file((folder / name).read_bytes(), media_type), methods=["GET"])
    app.add_route("/favicon.ico", _file(b"", "image/x-icon"), methods=["GET"])


def _file(content: bytes, media_type: str) -> Callable[[Request], Response]:
    """What answers with a packaged file."""
    return lambda http: Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _answer_errors(app: FastAPI) -> None:
    def answer(error: Exception) -> Response:
        known = as_api_error(error)
        return JSONResponse(known.body(), known.status, known.headers)

    async def of_ours(http: Request, error: Exception) -> Response:
        return answer(error)

    async def of_http(http: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = {404: f"there is no {http.url.path[:100]!r} here", 405: f"{http.method} is not for this path"}
        return answer(ApiError(status, said.get(status, "the request is wrong")))

    async def of_defect(http: Request, error: Exception) -> Response:
        known = as_api_error(error)
        if known.status == 500:
            log.error("a request failed", exc_info=error)
        return answer(known)

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(TealError, of_defect)  # what no handler knows, the guard answers
