"""Errors as OpenAI's API gives them: {"error": {"message", "type", "param", "code"}} with a status."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ether_diffusion.errors import printable
from ether_diffusion.serving import Cancelled, DeadlineExceeded, EngineClosed, EngineFull, UnknownAdapter
from ether_diffusion.serving.forwards import is_out_of_memory

LOG = logging.getLogger("ether_diffusion.server")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CLIENT_LEFT = 499
"""Nobody reads it; for the counts, as nginx has it."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ApiError(Exception):
    """A request that is answered with an error.

    param: the field of the request that it is about. code: for programs. retry_after: seconds, with 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, printable(message), param, code
        self.retry_after = retry_after

    def __reduce__(self) -> tuple:  # it passes between the machines of a cluster
        return _remake, (self.status, self.message, self.param, self.code, self.retry_after)

    @property
    def content(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def _remake(status: int, message: str, param: str | None, code: str | None, retry_after: int | None) -> ApiError:
    return ApiError(status, message, param=param, code=code, retry_after=retry_after)


def of_engine(error: BaseException, *, retry_after: int = 1) -> ApiError:
    """What a request is answered whose job failed, or was not taken, with this."""
    text = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownAdapter):
        return ApiError(404, text, param="adapter", code="adapter_not_found")
    if isinstance(error, EngineFull):
        return ApiError(429, text, code="line_full", retry_after=retry_after)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, text, param="timeout", code="timeout")
    if isinstance(error, Cancelled):
        return ApiError(CLIENT_LEFT, text, code="cancelled")
    if isinstance(error, EngineClosed):
        return ApiError(503, "the server is stopping", code="stopping", retry_after=retry_after)
    if isinstance(error, ValueError):  # the pipeline's own checks of sizes and the like
        return ApiError(400, text)
    if is_out_of_memory(error):
        return ApiError(500, "there is too little memory for this request: ask for a smaller size", code="memory")
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the request failed on the server, whose log says why")


def of_file(error: Exception, folder: Path, name: str) -> ApiError:
    """What is answered about an adapter that cannot be read; says nothing of where the server keeps it."""
    if isinstance(error, OSError):
        if error.errno in NO_SPACE:
            return ApiError(507, "the server's disk is full; nothing was saved", param="file", code="disk_full")
        LOG.error("adapter %s cannot be read or written", printable(name), exc_info=error)
        return ApiError(500, f"the server cannot read or write the adapter {name}")
    text = printable(str(error))
    for place in sorted({str(folder), str(folder.absolute()), str(folder.resolve())}, key=len, reverse=True):
        text = text.replace(f"{printable(place)}/", "")
    return ApiError(422, text, param="adapter", code="adapter_does_not_fit")


def add_handlers(app: FastAPI) -> None:
    """Have all errors of an app answered in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def answer(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(max(error.errors(), key=lambda fault: len(fault["loc"]))).response()

    @app.exception_handler(HTTPException)
    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def answer_failure(_: Request, error: Exception) -> JSONResponse:
        return of_engine(error).response()


def _of_validation(fault: Mapping[str, Any]) -> ApiError:
    """A body that is no JSON, or a field of it that does not fit.

    fault: its loc is ("body", field, …), with the kind that was tried where a field may have several.
    """
    place = [part for part in map(str, fault["loc"][1:]) if part != "str" and not part.startswith("dict[")]
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {fault.get('ctx', {}).get('error', fault['msg'])}")
    where = ".".join(place) or "body"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "there is no such field"
    return ApiError(400, f"{where[:200]}: {message}", param=place[0] if place else None)
