"""Routes for versions that are made of others after them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ema_server.http.middleware import UPLOAD
from ema_server.http.resolve import address_of
from ema_server.http.routes.derive import delete_derived
from ema_server.http.routes.derived_schemas import SynthesizedOut, SynthesizeIn
from ema_server.http.routes.recalibrate import Uploads, find_base, recalibrate_version, received
from ema_server.http.routes.synthesize import synthesize
from ema_server.http.schemas import ProblemOut, VersionOut
from ema_server.http.services import Services

_TENSORS = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def router(services: Services) -> APIRouter:
    """`…/synthesize`, `…/recalibrate`, and the end of a derived version."""
    routes = APIRouter(prefix="/v1/runs/{run}", tags=["derived versions"])
    uploads = Uploads()

    @routes.post(
        "/synthesize",
        operation_id="synthesize",
        status_code=201,
        responses={
            200: {"model": SynthesizedOut, "description": "It has been made before: the version that exists"},
            409: {"model": ProblemOut, "description": "What is stored does not suffice, or the name is taken"},
        },
    )
    async def make(run: str, body: SynthesizeIn, response: Response) -> SynthesizedOut:
        """Make a power-function average that was not kept, of those that were. Answers once it is durable."""
        made, is_new = await synthesize(services, run, body)
        response.headers["Location"] = address_of(made.version)
        if not is_new:
            response.status_code = 200
        return made

    @routes.post(
        "/averages/{average}/versions/{id}/" + UPLOAD,
        operation_id="recalibrate_version",
        status_code=201,
        responses={
            200: {"model": VersionOut, "description": "The same was uploaded before: the version that exists"},
            409: {"model": ProblemOut, "description": "The name is taken"},
            503: {"model": ProblemOut, "description": "Too many are sent at once, or it could not be made"},
        },
        openapi_extra={"requestBody": {"required": True, "content": _TENSORS}},
    )
    async def recalibrate(run: str, average: str, id: str, request: Request, response: Response) -> VersionOut:
        """Make the version `{average}-bn` that this one is with other buffers: those of a safetensors file.

        Only buffers can be replaced. Answers once the version is durable.
        """
        base = find_base(services, run, average, id)
        with uploads.one():
            made = await recalibrate_version(services, base, await received(request.body))
        response.headers["Location"] = address_of(made.version)
        if not made.is_new:
            response.status_code = 200
        shown: VersionOut = VersionOut.model_validate(made.version)
        return shown

    @routes.delete(
        "/averages/{average}/versions/{id}",
        operation_id="delete_version",
        status_code=204,
        responses={409: {"model": ProblemOut, "description": "It is not a derived one, or someone is reading it"}},
    )
    async def delete(run: str, average: str, id: str) -> None:
        """Delete a derived version, named by its 40 hex digits. The others go by themselves, as newer ones come."""
        await delete_derived(services, run, average, id)

    return routes
