"""Errors as RFC 9457 problems. Comes in: a `Problem`, or any other error of the framework; goes out: problem+json.

Every code a client can meet is in `Code`, with its status and title. Nothing here knows what the routes do.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
_DETAIL_CHARS_MAX = 2000
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class Code(Enum):
    """What went wrong: the word in the JSON, the status, the title."""

    BAD_REQUEST = ("bad_request", 400, "The request could not be understood")
    BAD_RANGE = ("bad_range", 400, "The Range header could not be understood")
    UNAUTHORIZED = ("unauthorized", 401, "A token is needed")
    NOT_FOUND = ("not_found", 404, "There is nothing at this address")
    RUN_NOT_FOUND = ("run_not_found", 404, "There is no such run")
    AVERAGE_NOT_FOUND = ("average_not_found", 404, "The run has no such average")
    VERSION_NOT_FOUND = ("version_not_found", 404, "The average has no such version")
    NO_VERSION_YET = ("no_version_yet", 404, "The average has no version yet")
    FILE_NOT_FOUND = ("file_not_found", 404, "The version has no such file")
    VALIDATION_NOT_FOUND = ("validation_not_found", 404, "The run has no such validation")
    METHOD_NOT_ALLOWED = ("method_not_allowed", 405, "The method is not allowed at this address")
    ALIAS_RANGE = ("alias_range", 409, "A download through an alias cannot be resumed")
    CANNOT_SYNTHESIZE = ("cannot_synthesize", 409, "What is stored of the run does not suffice")
    NAME_TAKEN = ("name_taken", 409, "The name is that of another average")
    NOT_STREAMING = ("not_streaming", 409, "The run has no trainer")
    AVERAGES_CONFLICT = ("averages_conflict", 409, "The averages of the run cannot be changed so")
    NO_LEDGER = ("no_ledger", 409, "The version has no ledger of its own")
    NOT_DERIVED = ("not_derived", 409, "Only derived versions can be deleted")
    VERSION_HELD = ("version_held", 409, "The version is being read")
    UPLOAD_TIMEOUT = ("upload_timeout", 408, "The body took too long to come")
    LEASE_LOST = ("lease_lost", 410, "The lease is lost")
    PRECONDITION_FAILED = ("precondition_failed", 412, "A precondition of the request failed")
    BODY_TOO_LARGE = ("body_too_large", 413, "The body is too large")
    RANGE_NOT_SATISFIABLE = ("range_not_satisfiable", 416, "The range lies outside the file")
    INVALID = ("invalid", 422, "The request has a wrong value")
    ALIAS_NOT_ALLOWED = ("alias_not_allowed", 422, "Metrics belong to an immutable version")
    INTERNAL = ("internal", 500, "The server failed")
    DAMAGED = ("damaged", 500, "The file is damaged on the server's disk")
    NOT_READY = ("not_ready", 503, "The server is not ready")
    BUSY = ("busy", 503, "The server has enough to do")
    PUBLISH_FAILED = ("publish_failed", 503, "The run could not be published")
    NO_EVALUATOR = ("no_evaluator", 503, "Nobody evaluates here")
    DERIVE_FAILED = ("derive_failed", 503, "The version could not be made")
    METRICS_UNAVAILABLE = ("metrics_unavailable", 503, "The metrics could not be read or written")
    NO_ROOM = ("no_room", 507, "There is no room on the server's disk")
    OUT_OF_MEMORY = ("out_of_memory", 507, "There is no room in the server's memory")

    def __init__(self, word: str, status: int, title: str) -> None:
        self.word = word
        self.status = status
        self.title = title


class Problem(HTTPException):
    """An error to be answered as it is. An HTTPException, because FastAPI lets only those pass while it reads a body.

    Args:
        code: which one.
        detail: what is wrong, with which value, and what to do.
        headers: headers of the response.
        extra: extension members of the body.
    """

    def __init__(
        self,
        code: Code,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(code.status, detail, headers)
        self.code = code
        self.extra = extra


def problem_response(problem: Problem, scope: Scope) -> JSONResponse:
    """The response that answers `problem` for the request of `scope`."""
    code = problem.code
    body = {
        "type": f"urn:ema-sidecar:problem:{code.word}",
        "title": code.title,
        "status": code.status,
        "detail": problem.detail[:_DETAIL_CHARS_MAX],
        "instance": scope["path"][:_DETAIL_CHARS_MAX],
        "code": code.word,
        **(problem.extra or {}),
    }
    return JSONResponse(body, status_code=code.status, headers=dict(problem.headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem: ours, the framework's, and the unforeseen."""

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return problem_response(error, request.scope)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _from_http(error, request.scope)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem_response(Problem(Code.INVALID, _describe(error)), request.scope)

    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return problem_response(Problem(Code.INTERNAL, f"{type(error).__name__}: see the server's log"), request.scope)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_failure)


def _from_http(error: HTTPException, scope: Scope) -> JSONResponse:
    """The framework's own errors: no such path, no such method, a body that cannot be read."""
    known = {code.status: code for code in (Code.BAD_REQUEST, Code.NOT_FOUND, Code.METHOD_NOT_ALLOWED)}
    code = known.get(error.status_code, Code.INTERNAL)
    detail = f"{scope['method']} {scope['path']}: {error.detail}; GET openapi.json lists the addresses"
    headers = {"Allow": _allowed(scope)} if code is Code.METHOD_NOT_ALLOWED else error.headers
    return problem_response(Problem(code, detail, headers=headers), scope)


def _allowed(scope: Scope) -> str:
    """Every method of the address; the framework names those of the first route that matches."""
    routes = scope["app"].router.routes
    return ", ".join(
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    )


def _describe(error: RequestValidationError) -> str:
    """Where and what, without the input: it may be long, secret or (NaN) not JSON."""
    lines = (f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
    return "; ".join(lines)
