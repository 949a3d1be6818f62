"""Routes for the files of a version: GET and HEAD, ranges and validators included."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ema_server.evaluation.metric_store import Subject
from ema_server.http.resolve import find_file, find_version, is_alias, redirect, refuse_resume
from ema_server.http.routes.blob import Blob
from ema_server.http.services import Services

_PATH = "/v1/runs/{run}/averages/{average}/versions/{rev}/files/{name}"
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"description": "The whole file", **_BYTES},
    206: {"description": "The ranges asked for", **_BYTES},
    304: {"description": "Not modified"},
    307: {"description": "`rev` is an alias: see Location"},
}


def router(services: Services) -> APIRouter:
    """`…/versions/{rev}/files/{name}`."""
    routes = APIRouter(tags=["files"])

    def respond(run: str, average: str, rev: str, name: str, request: Request) -> Response:
        version = find_version(services, run, average, rev)
        entry = find_file(version, name)
        if is_alias(rev):
            refuse_resume(version, entry, request.headers)
            return redirect(version, f"../../{version.id}/files/{entry.name}")
        if request.method == "GET":
            services.metrics.hand_out(Subject(run, average, version.id, version.step))
        return Blob(services.catalog, version, entry, private=services.token is not None)

    @routes.get(_PATH, operation_id="get_file", response_class=Response, responses=_RESPONSES)
    async def get_file(run: str, average: str, rev: str, name: str, request: Request) -> Response:
        """A file. Its strong ETag is its sha256; ranges, If-Range and If-None-Match are honoured."""
        return respond(run, average, rev, name, request)

    @routes.head(_PATH, operation_id="head_file", response_class=Response, responses=_RESPONSES)
    async def head_file(run: str, average: str, rev: str, name: str, request: Request) -> Response:
        """The headers that GET would send."""
        return respond(run, average, rev, name, request)

    return routes
