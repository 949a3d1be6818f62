"""The files of a version: whole, in ranges, or 304."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import Response

from ema_server.http.download import Download
from ema_server.http.resolve import find_file, find_version, is_alias, path_of, redirect, refuse_resume
from ema_server.http.schemas import ProblemOut
from ema_server.http.services import ServicesDep

_PATH = "/v1/runs/{run}/averages/{average}/versions/{rev}/files/{name:file}"
_BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES: dict[int | str, dict[str, object]] = {
    200: {"description": "The whole file", **_BYTES},
    206: {"description": "The ranges asked for", **_BYTES},
    304: {"description": "Not modified"},
    307: {"description": "`rev` is an alias: see Location"},
    409: {"model": ProblemOut, "description": "`rev` is an alias, and a download through it cannot be resumed"},
    412: {"model": ProblemOut, "description": "If-Match or If-Unmodified-Since is of another file"},
    416: {"model": ProblemOut, "description": "No range lies in the file: see Content-Range"},
}

router = APIRouter(tags=["files"])


class _FileName(StringConvertor):
    """In a path: `NAME` or `FOLDER/NAME`."""

    regex = "[^/]+(?:/[^/]+)?"


register_url_convertor("file", _FileName())


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
    description=(
        "A file. Its strong ETag is its sha256, which Repr-Digest and Digest also give. Ranges and the preconditions "
        "of RFC 9110 are honoured."
    ),
)
async def file(run: str, average: str, rev: str, name: str, request: Request, services: ServicesDep) -> Response:
    version = find_version(services, run, average, rev)
    entry = find_file(version, name)
    if is_alias(rev):
        refuse_resume(f"…/versions/{version.id}/files/{entry.name}", request.headers)
        return redirect(request, version, f"{path_of(version)}/files/{entry.name}")
    return Download(services, version, entry)
