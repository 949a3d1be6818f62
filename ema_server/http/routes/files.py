"""The files of a version: whole, in ranges, or 304. The version is held until the last byte is sent."""

from __future__ import annotations

import base64
import os
from contextlib import ExitStack
from pathlib import Path

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ema_server.evaluation.metric_store import Subject
from ema_server.http.problems import Code, Problem, problem_response
from ema_server.http.resolve import (
    find_file,
    find_version,
    immutable_headers,
    is_alias,
    is_current,
    redirect,
    refuse_resume,
)
from ema_server.http.services import Services, ServicesDep
from ema_server.storage.catalog import FileEntry, Version, VersionGone

_PATH = "/v1/runs/{run}/averages/{average}/versions/{rev}/files/{name}"
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"description": "The whole file", **_BYTES},
    206: {"description": "The ranges asked for", **_BYTES},
    304: {"description": "Not modified"},
    307: {"description": "`rev` is an alias: see Location"},
}
_MEDIA_TYPES = {".json": "application/json", ".safetensors": "application/octet-stream"}

router = APIRouter(tags=["files"])


@router.head(
    _PATH,
    name="head_file",
    operation_id="head_file",
    response_class=Response,
    responses=_RESPONSES,
    description="The headers that GET would send.",
)
@router.get(
    _PATH,
    name="get_file",
    operation_id="get_file",
    response_class=Response,
    responses=_RESPONSES,
    description="A file. Its strong ETag is its sha256; ranges, If-Range and If-None-Match are honoured.",
)
async def file(run: str, average: str, rev: str, name: str, request: Request, services: ServicesDep) -> Response:
    version = find_version(services, run, average, rev)
    entry = find_file(version, name)
    if is_alias(rev):
        refuse_resume(version, entry, request.headers)
        return redirect(version, f"../../{version.id}/files/{entry.name}")
    if request.method == "GET":
        services.metrics.hand_out(Subject(run, average, version.id, version.step))
    return _Download(services, version, entry)


class _Download(FileResponse):
    """The response for GET and HEAD of one file of a version; a problem if it is gone or damaged."""

    # The default of 64 KiB spends most of its time between threads: 1 MiB measured three times as fast.
    chunk_size = 1 << 20

    def __init__(self, services: Services, version: Version, entry: FileEntry) -> None:
        self._catalog = services.catalog
        self._version = version
        self._entry = entry
        self._etag = f'"{entry.sha256}"'
        digest = base64.b64encode(bytes.fromhex(entry.sha256)).decode()
        super().__init__(
            version.folder / entry.name,
            headers={
                **immutable_headers(services, self._etag),
                "Repr-Digest": f"sha-256=:{digest}:",
                "X-EMA-Step": str(version.step),
            },
            media_type=_MEDIA_TYPES.get(Path(entry.name).suffix, "application/octet-stream"),
            filename=_saved_name(version, entry),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_current(Headers(scope=scope), self._etag):
            kept = ("etag", "cache-control", "x-ema-step")
            await Response(status_code=304, headers={key: self.headers[key] for key in kept})(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(self._catalog.hold(self._version))
                self.stat_result = await self._stat()
            except (VersionGone, FileNotFoundError):
                detail = f"version {self._version.id} was pruned a moment ago; take a newer one"
                raise Problem(Code.VERSION_NOT_FOUND, detail) from None
            self.set_stat_headers(self.stat_result)
            await super().__call__(scope, receive, self._with_problems(scope, receive, send))

    async def _stat(self) -> os.stat_result:
        found = await anyio.to_thread.run_sync(os.stat, self.path)
        if found.st_size != self._entry.size:
            detail = f"{self._entry.name} has {found.st_size} bytes on disk, it was written with {self._entry.size}"
            raise Problem(Code.DAMAGED, detail)
        return found

    def _with_problems(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """Replace Starlette's plain-text answers to a bad Range by problems."""
        replaced = False

        async def guarded(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                replaced = True
                problem = self._range_problem(message["status"], Headers(scope=scope)["range"])
                await problem_response(problem, scope)(scope, receive, send)
            elif not replaced:
                await send(message)

        return guarded

    def _range_problem(self, status: int, wanted: str) -> Problem:
        size = self._entry.size
        if status == Code.RANGE_NOT_SATISFIABLE.status:
            headers = {"Content-Range": f"bytes */{size}"}
            return Problem(Code.RANGE_NOT_SATISFIABLE, f"{wanted[:200]!r} of a file of {size} bytes", headers=headers)
        return Problem(Code.BAD_RANGE, f"{wanted[:200]!r} is not 'bytes=FIRST-LAST', 'bytes=FIRST-' or 'bytes=-COUNT'")


def _saved_name(version: Version, entry: FileEntry) -> str:
    """The name under which a browser saves the file: it says which version it is, so that two cannot be mixed up."""
    stem = f"{version.run}-{version.average}-step-{version.step}"
    return f"{stem}.safetensors" if entry.name == "model.safetensors" else f"{stem}-{entry.name}"
