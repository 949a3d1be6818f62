"""The averages of a run: their status, add one, remove one."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.responses import Response

from ema_server.http import commands
from ema_server.http.resolve import average_status, relative_link, run_status
from ema_server.http.schemas import AverageOut, Out, ProblemOut
from ema_server.http.services import ServicesDep

_SPEC_CHARS_MAX = 100_000  # patterns of tensor names are part of it
_REFUSED: dict[int | str, dict[str, Any]] = {
    409: {
        "model": ProblemOut,
        "description": "No trainer streams the run, the name is taken, or it is the last average",
    },
    507: {"model": ProblemOut, "description": "Not enough memory on the server"},
}

router = APIRouter(prefix="/v1/runs/{run}", tags=["averages"])


class AveragesOut(Out):
    """The averages of a run, in the order in which they were added."""

    averages: tuple[AverageOut, ...]


class AverageIn(BaseModel):
    """A rule as in a trainer's list, and a name in place of the rule's default."""

    model_config = ConfigDict(extra="forbid")

    spec: Annotated[str, StringConstraints(min_length=1, max_length=_SPEC_CHARS_MAX)]
    name: Annotated[str, StringConstraints(max_length=200)] = ""


@router.get("/averages", operation_id="list_averages")
async def list_averages(run: str, services: ServicesDep) -> AveragesOut:
    """The status of each average of a run: its decay, its age, the share of the initial weights."""
    return AveragesOut.model_validate(run_status(services, run))


@router.get("/averages/{average}", operation_id="get_average")
async def get_average(run: str, average: str, services: ServicesDep) -> AverageOut:
    """The status of one average."""
    return AverageOut.model_validate(average_status(services, run, average))


@router.post("/averages", operation_id="add_average", status_code=201, responses=_REFUSED)
async def add(run: str, body: AverageIn, request: Request, response: Response, services: ServicesDep) -> AverageOut:
    """Add an average to a streaming run; it begins with the next snapshot. Answers once that is durable."""
    added = await commands.add_average(services, run, body.spec, body.name)
    response.headers["Location"] = relative_link(request, f"/v1/runs/{run}/averages/{added.name}")
    return AverageOut.model_validate(added)


@router.delete("/averages/{average}", operation_id="remove_average", status_code=204, responses=_REFUSED)
async def remove(run: str, average: str, services: ServicesDep) -> None:
    """Remove an average from a streaming run. Its versions stay as long as their generations do."""
    await commands.remove_average(services, run, average)
