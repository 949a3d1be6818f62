"""Versions: list them, get one, publish now."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ema_server.http import commands
from ema_server.http.conditional import immutable_headers, is_unmodified
from ema_server.http.resolve import average_versions, find_version, is_alias, path_of, redirect
from ema_server.http.schemas import PublishedOut, VersionOut, VersionsOut
from ema_server.http.services import ServicesDep

router = APIRouter(prefix="/v1/runs/{run}", tags=["versions"])


@router.get("/averages/{average}/versions", operation_id="list_versions")
async def list_versions(run: str, average: str, services: ServicesDep) -> VersionsOut:
    """Versions of an average, newest first."""
    found = average_versions(services, run, average)
    return VersionsOut(versions=tuple(VersionOut.model_validate(version) for version in found))


@router.get(
    "/averages/{average}/versions/{rev}",
    operation_id="get_version",
    response_model=VersionOut,
    responses={304: {"description": "Not modified"}, 307: {"description": "`rev` is an alias: see Location"}},
)
async def get_version(run: str, average: str, rev: str, request: Request, services: ServicesDep) -> Response:
    """One version. `rev` is its 40 hex digits; `step-N` and `latest` are redirected to them."""
    version = find_version(services, run, average, rev)
    if is_alias(rev):
        return redirect(request, version, path_of(version))
    headers = immutable_headers(services, f'"{version.id}"')
    if is_unmodified(request.headers, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return JSONResponse(VersionOut.model_validate(version).model_dump(mode="json"), headers=headers)


@router.post(
    "/versions",
    operation_id="publish_run",
    status_code=201,
    responses={200: {"model": PublishedOut, "description": "Nothing new: the existing versions"}},
)
async def publish(run: str, response: Response, services: ServicesDep) -> PublishedOut:
    """Publish the run now; answers once the versions are durable."""
    durable = await commands.publish(services, run)
    if not durable.new:
        response.status_code = 200
    versions = tuple(VersionOut.model_validate(version) for version in durable.versions)
    return PublishedOut(step=durable.step, versions=versions)
