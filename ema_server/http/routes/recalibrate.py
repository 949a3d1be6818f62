"""`POST …/recalibrate`: a version with other buffers, which the client computed and uploads."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_server.derived.recalibration import RECALIBRATED, SUFFIX, BadBuffers, recalibrate
from ema_server.http.middleware import UPLOAD
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias, path_of, relative_link
from ema_server.http.routes.derived import busy, derive
from ema_server.http.schemas import ProblemOut, VersionOut
from ema_server.http.services import UPLOADS_MAX, Services, ServicesDep
from ema_server.storage.catalog import Version, content_nbytes

_TENSORS = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

router = APIRouter(prefix="/v1/runs/{run}", tags=["derived versions"])


@router.post(
    "/averages/{average}/versions/{id}/" + UPLOAD,
    operation_id="recalibrate_version",
    status_code=201,
    responses={
        200: {"model": VersionOut, "description": "The same upload was made before: the version that exists"},
        409: {"model": ProblemOut, "description": "The name is taken"},
        503: {"model": ProblemOut, "description": "Too many uploads at once, or the version could not be made"},
    },
    openapi_extra={"requestBody": {"required": True, "content": _TENSORS}},
    name="recalibrate",
)
async def upload(
    run: str, average: str, id: str, request: Request, response: Response, services: ServicesDep
) -> VersionOut:
    """Make the version `{average}-bn`: this one with the buffers of a safetensors file.

    Only buffers can be replaced. Answers once the version is durable.
    """
    base = find_version(services, run, average, id)
    if is_alias(id):
        raise Problem(Code.INVALID, f"{id!r} is an alias and may move: give the 40 hex digits, now {base.id}")
    _check_name(services, base)
    if services.uploads.locked():
        raise busy(f"{UPLOADS_MAX} uploads, the maximum, are being received or processed: try again later")
    async with services.uploads:
        version, is_new = await _recalibrate(services, base, await request.body())
    response.headers["Location"] = relative_link(request, path_of(version))
    if not is_new:
        response.status_code = 200
    shown: VersionOut = VersionOut.model_validate(version)
    return shown


async def _recalibrate(services: Services, base: Version, data: bytes) -> tuple[Version, bool]:
    _check_name(services, base)  # again: it may have been taken during the upload
    nbytes = content_nbytes(base.files)
    try:
        return await derive(services, nbytes, partial(recalibrate, services.deriving, base, data))
    except BadBuffers as error:
        raise Problem(Code.INVALID, str(error)) from None


def _check_name(services: Services, base: Version) -> None:
    name = base.average + SUFFIX
    if base.derived == RECALIBRATED:
        detail = f"version {base.id} has recomputed buffers already: recompute those of {base.average[: -len(SUFFIX)]}"
        raise Problem(Code.INVALID, detail)
    try:
        check_name("average", name)
    except LocalProtocolError as error:
        raise Problem(Code.INVALID, f"the new version would be listed as {name!r}: {error}") from None
    status = services.statuses.get(base.run)
    kept = () if status is None else status.averages
    known = services.catalog.versions(base.run, name)
    if any(one.name.lower() == name.lower() for one in kept) or any(one.derived != RECALIBRATED for one in known):
        detail = f"run {base.run!r} has another average {name!r}, and the new version would be listed under that name"
        raise Problem(Code.NAME_TAKEN, detail)
