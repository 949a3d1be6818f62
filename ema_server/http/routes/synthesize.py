"""`POST …/synthesize`: a power average that was not kept, made of stored ones."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from ema_proto.averages.rules import PowerEma
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import STEP_MAX
from ema_server.derived.plan import CannotSynthesize
from ema_server.derived.queue import NameTaken, Synthesized
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import path_of, relative_link, run_status
from ema_server.http.routes.derived import derive, refuse_taken
from ema_server.http.schemas import Finite, Name, Out, ProblemOut, VersionOut
from ema_server.http.services import ServicesDep

router = APIRouter(prefix="/v1/runs/{run}", tags=["derived versions"])


class SynthesizeIn(BaseModel):
    """The power average to make: its width or its exponent, its step (default: the newest) and its name."""

    model_config = ConfigDict(extra="forbid")

    sigma_rel: Finite | None = None
    gamma: Finite | None = None
    step: Annotated[int, Field(ge=1, le=STEP_MAX)] | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> SynthesizeIn:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ValueError("give either sigma_rel, for example 0.12, or gamma")
        return self


class InputOut(Out):
    """One stored average in the sum: version `id` at `step`."""

    average: str
    step: int
    id: str
    share: float


class SynthesizedOut(Out):
    """A version made of stored power averages, and its accuracy.

    `estimated_error` is the relative L2 error of the weights of its steps, `amplification` the sum of the shares'
    absolute values, `rounding` the largest error that this makes of the stored tensors' rounding; `origin`: the step
    from which its time is counted.
    """

    version: VersionOut
    sigma_rel: float
    gamma: float
    origin: int
    estimated_error: float
    amplification: float
    rounding: float
    warning: str | None
    inputs: tuple[InputOut, ...]


@router.post(
    "/synthesize",
    operation_id="synthesize",
    status_code=201,
    responses={
        200: {"model": SynthesizedOut, "description": "It exists already: the version"},
        409: {"model": ProblemOut, "description": "The stored snapshots do not suffice, or the name is taken"},
    },
)
async def make(
    run: str, body: SynthesizeIn, request: Request, response: Response, services: ServicesDep
) -> SynthesizedOut:
    """Make a power-function average that was not kept from stored ones. Answers once it is durable."""
    status = run_status(services, run)
    rule = _rule(body)
    refuse_taken(services, status, rule.name)
    work = partial(services.deriving.synthesize, status.run, rule, body.step)
    try:
        made = await derive(services, 2 * status.snapshot_bytes, work)  # float32 of what may be sent in 16 bits
    except CannotSynthesize as error:
        raise Problem(Code.CANNOT_SYNTHESIZE, f"run {run!r}: {error}") from None
    except NameTaken as error:
        raise Problem(Code.NAME_TAKEN, str(error)) from None
    response.headers["Location"] = relative_link(request, path_of(made.version))
    if not made.is_new:
        response.status_code = 200
    return _shown(made)


def _rule(body: SynthesizeIn) -> PowerEma:
    try:
        return PowerEma(body.sigma_rel, name=body.name or "", gamma=body.gamma)
    except LocalProtocolError as error:
        raise Problem(Code.INVALID, str(error)) from None


def _shown(made: Synthesized) -> SynthesizedOut:
    facts = made.facts
    return SynthesizedOut(
        version=VersionOut.model_validate(made.version),
        sigma_rel=facts["sigma_rel"],
        gamma=facts["gamma"],
        origin=facts["origin"],
        estimated_error=facts["estimated_error"],
        amplification=facts["amplification"],
        rounding=facts["rounding"],
        warning=facts["warning"],
        inputs=tuple(InputOut(**part) for part in facts["inputs"]),
    )
