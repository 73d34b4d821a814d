"""What a client is told when something is wrong: OpenAI's error object, on every path."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from smolcluster.errors import ServingError
from smolcluster.serving.conversations import Conflict, Unknown
from smolcluster.serving.openai import error_body, told_wrong
from smolcluster.serving.requests import ContextOverflow, QueueFull, Unavailable
from smolcluster.serving.sessions import StoreFailed

logger = logging.getLogger(__name__)

RETRY_AFTER = 1  # seconds


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Args:
        status: HTTP's.
        message, kind, param, code: of OpenAI's error object.
        """
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param=param, code=code)


def reason(error: Exception) -> str:
    """What is wrong, in words."""
    if isinstance(error, ValidationError):
        return told_wrong(error.errors())[0]
    return str(error)


def add_errors(app: FastAPI) -> None:
    """OpenAI's error object, whatever is wrong."""

    @app.exception_handler(Refusal)
    async def _(_: Request, error: Refusal) -> Response:
        return JSONResponse(error.body, status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Response:
        message, param = told_wrong(error.errors())
        return JSONResponse(error_body(message, "invalid_request_error", param=param), status_code=400)

    @app.exception_handler(ContextOverflow)
    async def _(_: Request, error: ContextOverflow) -> Response:
        body = error_body(str(error), "invalid_request_error", param="messages", code="context_length_exceeded")
        return JSONResponse(body, status_code=400)

    @app.exception_handler(QueueFull)
    async def _(_: Request, error: QueueFull) -> Response:
        body = error_body(str(error), "rate_limit_error", code="queue_full")
        return JSONResponse(body, status_code=429, headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(Unavailable)
    async def _(_: Request, error: Unavailable) -> Response:
        body = error_body(str(error), "server_error", code="unavailable")
        return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(Unknown)
    async def _(_: Request, error: Unknown) -> Response:
        return JSONResponse(error_body(str(error), "invalid_request_error", code="not_found"), status_code=404)

    @app.exception_handler(Conflict)
    async def _(_: Request, error: Conflict) -> Response:
        return JSONResponse(error_body(str(error), "invalid_request_error", code=error.code), status_code=409)

    @app.exception_handler(StoreFailed)
    async def _(_: Request, error: StoreFailed) -> Response:
        logger.error("sessions failed reason=%s", error)
        return JSONResponse(error_body(str(error), "server_error", code="sessions_failed"), status_code=500)

    @app.exception_handler(ServingError)
    async def _(_: Request, error: ServingError) -> Response:
        return JSONResponse(error_body(str(error), "invalid_request_error"), status_code=400)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if "Allow" in headers:  # of the first route with this path; others may have more
            headers["Allow"] = ", ".join(sorted(_methods(app, request)))
        return JSONResponse(
            error_body(str(error.detail), "invalid_request_error"), status_code=error.status_code, headers=headers
        )

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> Response:
        logger.error("a request has failed", exc_info=error)
        return JSONResponse(error_body("the server has failed; see its log", "server_error"), status_code=500)


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Of all routes with the path that was asked for."""
    found: set[str] = set()
    for route in app.router.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return found
