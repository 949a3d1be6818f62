"""`POST …/blend`: the weighted sum of versions."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import Response

from ema_proto.errors import LocalProtocolError
from ema_proto.names import check_name
from ema_server.derived.blend import (
    INPUTS_MAX,
    BadWeights,
    CannotBlend,
    Weighted,
    blend,
    check_weights,
    default_name,
)
from ema_server.derived.queue import NameTaken
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, path_of, relative_link, run_status
from ema_server.http.routes.derived import derive, refuse_taken
from ema_server.http.schemas import Finite, Name, Out, ProblemOut, VersionOut
from ema_server.http.services import Services, ServicesDep

router = APIRouter(prefix="/v1/runs/{run}", tags=["derived versions"])


class BlendInputIn(BaseModel):
    """A version and its weight. `run` is by default that of the address.

    `rev` is by default `latest` for the first version and for one of another run; for the others it is the first
    version's step.
    """

    model_config = ConfigDict(extra="forbid")

    run: Name | None = None
    average: Name
    rev: Annotated[str, StringConstraints(min_length=1, max_length=60)] | None = None
    weight: Finite


class BlendIn(BaseModel):
    """What to add up, and the name of the average (default: made of the inputs' names and weights).

    The first input is of the run of the address. The weights add up to 1 and may be negative.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: Annotated[tuple[BlendInputIn, ...], Field(min_length=2, max_length=INPUTS_MAX)]
    name: Name | None = None


class BlendInputOut(Out):
    """One version in the sum: version `id` at `step`."""

    run: str
    average: str
    step: int
    id: str
    weight: float


class BlendedOut(Out):
    """The weighted sum of versions."""

    version: VersionOut
    inputs: tuple[BlendInputOut, ...]


@router.post(
    "/blend",
    operation_id="blend",
    status_code=201,
    responses={
        200: {"model": BlendedOut, "description": "It exists already: the version"},
        409: {"model": ProblemOut, "description": "The versions cannot be blended, or the name is taken"},
    },
)
async def make(run: str, body: BlendIn, request: Request, response: Response, services: ServicesDep) -> BlendedOut:
    """Make the weighted sum of versions. Answers once it is durable."""
    status = run_status(services, run)
    inputs = _inputs(services, run, body)
    name = body.name or default_name(inputs)
    _check_name(name, is_default=body.name is None)
    refuse_taken(services, status, name)
    nbytes = 2 * status.snapshot_bytes  # float32 of what may be sent in 16 bits
    try:
        version, is_new = await derive(services, nbytes, partial(blend, services.deriving, inputs, name))
    except CannotBlend as error:
        raise Problem(Code.CANNOT_BLEND, str(error)) from None
    except NameTaken as error:
        raise Problem(Code.NAME_TAKEN, str(error)) from None
    response.headers["Location"] = relative_link(request, path_of(version))
    if not is_new:
        response.status_code = 200
    return BlendedOut(version=VersionOut.model_validate(version), inputs=tuple(map(_shown, inputs)))


def _inputs(services: Services, run: str, body: BlendIn) -> list[Weighted]:
    try:
        check_weights([each.weight for each in body.inputs])
    except BadWeights as error:
        raise Problem(Code.INVALID, str(error)) from None
    if body.inputs[0].run not in (None, run):
        detail = f"the first version is of run {body.inputs[0].run!r}: ask at the address of that run, /v1/runs/…/blend"
        raise Problem(Code.INVALID, detail)
    found = list[Weighted]()
    for each in body.inputs:
        of = run if each.run is None else each.run
        default = f"step-{found[0].version.step}" if found and of == run else "latest"
        found.append(Weighted(find_version(services, of, each.average, each.rev or default), each.weight))
    return found


def _check_name(name: str, *, is_default: bool) -> None:
    try:
        check_name("average", name)
    except LocalProtocolError as error:
        hint = ": give the blend a name" if is_default else ""
        raise Problem(Code.INVALID, f"{error}{hint}") from None


def _shown(each: Weighted) -> BlendInputOut:
    version = each.version
    return BlendInputOut(run=version.run, average=version.average, step=version.step, id=version.id, weight=each.weight)
