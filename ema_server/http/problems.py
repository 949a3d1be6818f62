"""Errors as RFC 9457 problems: every code with its status and title, and the handlers that answer them.

Clients of the Hugging Face Hub read errors from headers: at the addresses of its protocol, problems have these too.
"""

from __future__ import annotations

import re
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
_HUB_MESSAGE_CHARS_MAX = 1000
_HUB_FILE = re.compile(r"/(?:resolve|raw)/")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class Code(Enum):
    """Each code: its word in the JSON, its status, its title."""

    BAD_REQUEST = ("bad_request", 400, "The request is malformed")
    BAD_RANGE = ("bad_range", 400, "The Range header is malformed")
    UNAUTHORIZED = ("unauthorized", 401, "A token is required")
    HOST_NOT_ALLOWED = ("host_not_allowed", 403, "The server does not answer to this name")
    CROSS_SITE = ("cross_site", 403, "Web pages of other sites may not write")
    NOT_FOUND = ("not_found", 404, "No such address")
    RUN_NOT_FOUND = ("run_not_found", 404, "No such run")
    RUN_UNREADABLE = ("run_unreadable", 404, "The run has no generation that can be read")
    AVERAGE_NOT_FOUND = ("average_not_found", 404, "No such average in the run")
    VERSION_NOT_FOUND = ("version_not_found", 404, "No such version of the average")
    NO_VERSION_YET = ("no_version_yet", 404, "The average has no version yet")
    FILE_NOT_FOUND = ("file_not_found", 404, "No such file in the version")
    VALIDATION_NOT_FOUND = ("validation_not_found", 404, "No such validation in the run")
    METHOD_NOT_ALLOWED = ("method_not_allowed", 405, "Method not allowed")
    ALIAS_RANGE = ("alias_range", 409, "A download through an alias cannot be resumed")
    CANNOT_SYNTHESIZE = ("cannot_synthesize", 409, "The stored snapshots of the run do not suffice")
    CANNOT_BLEND = ("cannot_blend", 409, "The versions cannot be blended")
    NAME_TAKEN = ("name_taken", 409, "The name belongs to another average")
    RUN_STREAMING = ("run_streaming", 409, "A trainer streams the run")
    NOT_STREAMING = ("not_streaming", 409, "No trainer streams the run")
    AVERAGES_CONFLICT = ("averages_conflict", 409, "The run does not accept this change of its averages")
    NO_LEDGER = ("no_ledger", 409, "The version has no ledger of its own")
    NOT_DERIVED = ("not_derived", 409, "Only derived versions can be deleted")
    VERSION_HELD = ("version_held", 409, "The version is being read")
    UPLOAD_TIMEOUT = ("upload_timeout", 408, "The body took too long to arrive")
    LEASE_LOST = ("lease_lost", 410, "The lease is lost")
    PRECONDITION_FAILED = ("precondition_failed", 412, "A precondition of the request failed")
    BODY_TOO_LARGE = ("body_too_large", 413, "The body is too large")
    RANGE_NOT_SATISFIABLE = ("range_not_satisfiable", 416, "The range lies outside the file")
    INVALID = ("invalid", 422, "The request has an invalid value")
    ALIAS_NOT_ALLOWED = ("alias_not_allowed", 422, "Metrics belong to an immutable version")
    INTERNAL = ("internal", 500, "Internal error")
    DAMAGED = ("damaged", 500, "The file is damaged on the server's disk")
    NOT_READY = ("not_ready", 503, "The server is not ready")
    BUSY = ("busy", 503, "The server is busy")
    PUBLISH_FAILED = ("publish_failed", 503, "The run could not be published")
    NO_EVALUATOR = ("no_evaluator", 503, "No evaluation worker is available")
    DELETE_FAILED = ("delete_failed", 503, "The run could not be deleted")
    DERIVE_FAILED = ("derive_failed", 503, "The version could not be made")
    METRICS_UNAVAILABLE = ("metrics_unavailable", 503, "The metrics could not be read or written")
    NO_ROOM = ("no_room", 507, "Not enough space on the server's disk")
    OUT_OF_MEMORY = ("out_of_memory", 507, "Not enough memory on the server")

    def __init__(self, word: str, status: int, title: str) -> None:
        self.word = word
        self.status = status
        self.title = title


# What clients of the Hub distinguish. A missing token has no word: they show the text then, which says what to send.
_HUB_CODES = {
    Code.NOT_FOUND: "RepoNotFound",
    Code.RUN_NOT_FOUND: "RepoNotFound",
    Code.RUN_UNREADABLE: "RepoNotFound",
    Code.AVERAGE_NOT_FOUND: "RepoNotFound",
    Code.VERSION_NOT_FOUND: "RevisionNotFound",
    Code.NO_VERSION_YET: "RevisionNotFound",
    Code.FILE_NOT_FOUND: "EntryNotFound",
}


class Problem(HTTPException):
    """An error and its answer. An HTTPException, because FastAPI passes on only those while it reads a body.

    Args:
        code: its word, status and title.
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
    headers = {**_hub_headers(problem, scope["path"]), **(problem.headers or {})}
    return JSONResponse(body, status_code=code.status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of `app` by a problem: ours, the framework's, and unexpected ones."""

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Problem)
        return problem_response(error, request.scope)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _from_http(error, request.scope)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        detail = _describe(error)
        if any(item["loc"][0] == "body" for item in error.errors()) and not _is_json(request):
            detail += "; send the body as JSON, with the header Content-Type: application/json"
        return problem_response(Problem(Code.INVALID, detail), request.scope)

    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return problem_response(Problem(Code.INTERNAL, f"{type(error).__name__}: see the server's log"), request.scope)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_failure)


def _hub_headers(problem: Problem, path: str) -> dict[str, str]:
    """The headers that clients of the Hub read, at an address of its protocol."""
    if not _is_of_hub(path):
        return {}
    text = problem.detail[:_HUB_MESSAGE_CHARS_MAX].replace("…", "...")
    headers = {"X-Error-Message": re.sub(r"[^ -~]", "?", text)}
    if problem.code in _HUB_CODES:
        headers["X-Error-Code"] = _HUB_CODES[problem.code]
    return headers


def _is_of_hub(path: str) -> bool:
    return path.startswith("/api/") or (bool(_HUB_FILE.search(path)) and not path.startswith("/v1/"))


def _from_http(error: HTTPException, scope: Scope) -> JSONResponse:
    """The framework's own errors: an unknown path, a wrong method, a malformed body."""
    known = {code.status: code for code in (Code.BAD_REQUEST, Code.NOT_FOUND, Code.METHOD_NOT_ALLOWED)}
    code = known.get(error.status_code, Code.INTERNAL)
    detail = f"{scope['method']} {scope['path']}: {error.detail}; GET openapi.json lists the addresses"
    if _is_of_hub(scope["path"]) and code is Code.NOT_FOUND:
        detail = f"{scope['path']}: the repositories of this server are models, RUN/AVERAGE; HF_ENDPOINT sends all here"
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


def _is_json(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json")


def _describe(error: RequestValidationError) -> str:
    """The places and messages, without the input, which may be long, secret or (NaN) not JSON."""
    lines = (f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
    return "; ".join(lines)
