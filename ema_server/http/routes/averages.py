"""Routes for the averages of a run: how they stand, one more, one less, and which steps are inside."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import Response, StreamingResponse

from ema_proto.limits import STEP_MAX
from ema_server.http.change import add_average, average_status, remove_average
from ema_server.http.conditional import immutable_headers
from ema_server.http.resolve import find_version, is_alias, redirect, run_status
from ema_server.http.routes.ledgers import ledger_json
from ema_server.http.schemas import AverageOut, Out, ProblemOut
from ema_server.http.services import Services

_SPEC_CHARS_MAX = 100_000  # patterns of tensor names are part of it


class AveragesOut(Out):
    """The averages of a run, in the order in which they came."""

    averages: tuple[AverageOut, ...]


class AverageIn(BaseModel):
    """A rule as in a trainer's list, and its name if that is not to be the rule's default."""

    model_config = ConfigDict(extra="forbid")

    spec: Annotated[str, StringConstraints(min_length=1, max_length=_SPEC_CHARS_MAX)]
    name: Annotated[str, StringConstraints(max_length=200)] = ""


class LedgerOut(Out):
    """The steps inside a version with their shares in it, newest first; `rest` is the share of those left out."""

    run: str
    average: str
    version: str
    spec: str
    step: int
    origin: int
    steps: Annotated[tuple[tuple[int, float], ...], Field(description="Pairs of step and share.")]
    rest: float


def router(services: Services) -> APIRouter:
    """`/v1/runs/{run}/averages`, and a version's ledger."""
    routes = APIRouter(prefix="/v1/runs/{run}", tags=["averages"])
    refused: dict[int | str, dict[str, Any]] = {
        409: {
            "model": ProblemOut,
            "description": "No trainer streams the run, or the name is taken, or it is the last",
        },
        507: {"model": ProblemOut, "description": "The server's memory does not suffice"},
    }

    @routes.get("/averages", operation_id="list_averages")
    async def list_averages(run: str) -> AveragesOut:
        """How each average of a run stands: its decay, its age, how much of the beginning is left."""
        return AveragesOut.model_validate(run_status(services, run))

    @routes.get("/averages/{average}", operation_id="get_average")
    async def get_average(run: str, average: str) -> AverageOut:
        """How one average stands."""
        return AverageOut.model_validate(average_status(services, run, average))

    @routes.post("/averages", operation_id="add_average", status_code=201, responses=refused)
    async def add(run: str, body: AverageIn, response: Response) -> AverageOut:
        """Add an average to a run that streams: it begins with the next snapshot. Answers once that is durable."""
        added = await add_average(services, run, body.spec, body.name)
        response.headers["Location"] = f"/v1/runs/{run}/averages/{added.name}"
        return AverageOut.model_validate(added)

    @routes.delete("/averages/{average}", operation_id="remove_average", status_code=204, responses=refused)
    async def remove(run: str, average: str) -> None:
        """Remove an average from a run that streams. Its versions stay as long as their generations do."""
        await remove_average(services, run, average)

    @routes.get(
        "/averages/{average}/versions/{rev}/ledger",
        operation_id="get_ledger",
        response_model=LedgerOut,
        responses={307: {"description": "`rev` is an alias: see Location"}},
    )
    async def ledger(
        run: str, average: str, rev: str, request: Request, tail: Annotated[int | None, Query(ge=1, le=STEP_MAX)] = None
    ) -> Response:
        """The steps inside a version with their shares, or the newest `tail` of them: enough to rebuild it."""
        version = find_version(services, run, average, rev)
        if is_alias(rev):
            query = f"?{request.url.query}" if request.url.query else ""
            return redirect(version, f"../{version.id}/ledger{query}")
        headers = immutable_headers(f'"{version.id}-ledger"', private=services.token is not None)
        pieces = await anyio.to_thread.run_sync(ledger_json, services.catalog, version, tail)
        return StreamingResponse(pieces, media_type="application/json", headers=headers)

    return routes
