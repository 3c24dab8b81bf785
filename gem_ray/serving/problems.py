"""Errors of the HTTP API as JSON problems (RFC 9457), without internals."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gem_ray.serving.access import REQUEST_ID
from gem_ray.serving.calls import BusyError, UnavailableError

if TYPE_CHECKING:
    from gem_ray.serving.flow import Flow

MEDIA_TYPE = "application/problem+json"
_MAX_DETAIL_CHARS = 1000
logger = logging.getLogger(__name__)


class ProblemDetails(BaseModel):
    """What every answer that is no success holds (RFC 9457)."""

    type: str = Field("about:blank", description="`about:blank`: the status says it all")
    title: str = Field(description="the status in words")
    status: int = Field(description="of the answer; of a line, the one that the post would have had alone")
    detail: str = Field(description="what is wrong, and how to mend it")
    instance: str | None = Field(None, description="not given")
    request_id: str | None = Field(None, description="`X-Request-ID`, which the server's logs have, too")


class ProblemError(Exception):
    """A request that is not done: the status to answer with, a sentence for a person, and headers."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        # It may quote what no UTF-8 can hold, and as much of it as a body can.
        self.detail = detail[:_MAX_DETAIL_CHARS].encode(errors="replace").decode()
        self.headers = headers or {}

    def to_dict(self) -> dict[str, Any]:
        """The members of `ProblemDetails`."""
        title = HTTPStatus(self.status).phrase
        details = ProblemDetails(title=title, status=self.status, detail=self.detail, request_id=REQUEST_ID.get())
        return details.model_dump(exclude_none=True)

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.to_dict(), self.status, self.headers, MEDIA_TYPE)


def problem_of(error: BaseException, retry_after_s: float) -> ProblemError:
    """What a client is told of an error; of a bug, nothing: the log has it."""
    later = {"Retry-After": str(retry_after_s)}
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, BusyError):
        return ProblemError(429, f"{error}; try again later", later)
    if isinstance(error, UnavailableError):
        return ProblemError(503, f"{error}; try again later", later)
    if isinstance(error, TimeoutError):
        return ProblemError(504, "the post was not annotated in time", later)
    if isinstance(error, ClientDisconnect):
        return ProblemError(400, "the connection was closed before the body was there")
    logger.error("request %s failed", REQUEST_ID.get(), exc_info=error)
    return ProblemError(500, "the server failed on this request; its log says why")


def allowed(methods: str) -> str:
    """An `Allow` header: what a route does itself, and what is done for every route."""
    own = {method.strip() for method in methods.split(",")}
    return ", ".join(sorted(own | {"OPTIONS"} | ({"HEAD"} if "GET" in own else set())))


def add_problem_handlers(api: FastAPI, flow: Flow) -> None:
    """Answer with problems where endpoints, routes, parameters and methods fail."""

    async def of_error(_: Request, error: Exception) -> JSONResponse:
        return problem_of(error, flow.retry_after_s).response()

    async def of_parameters(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        return ProblemError(422, "; ".join(lines)).response()

    async def of_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if "Allow" in headers:
            headers["Allow"] = allowed(headers["Allow"])
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        details = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not a method of {request.url.path}",
        }
        detail = details.get(error.status_code, HTTPStatus(error.status_code).phrase.lower())
        return ProblemError(error.status_code, detail, headers).response()

    for kind in (ProblemError, BusyError, UnavailableError, TimeoutError, Exception):
        api.add_exception_handler(kind, of_error)
    api.add_exception_handler(RequestValidationError, of_parameters)
    api.add_exception_handler(HTTPException, of_route)
