"""Leases for evaluation workers: ask for a version, extend the lease, hand in the result, or give it back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.responses import Response

from ema_server.evaluation.leases import LEASE_S, Ask, Finding, Lease
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, run_status
from ema_server.http.routes.metrics import row_of, store_errors
from ema_server.http.schemas import FindingIn, MetricsRowOut, Name, Out, ProblemOut, VersionOut
from ema_server.http.services import Services, ServicesDep

VersionId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
_LOST: dict[int | str, dict[str, object]] = {410: {"model": ProblemOut}}

router = APIRouter(prefix="/v1/leases", tags=["leases"])


class AskIn(BaseModel):
    """What a worker accepts (`run`, `averages`, `every`, `skip`), and when it asks again.

    With `version` it accepts that version alone: give its run, and its average as the only one.
    """

    model_config = ConfigDict(extra="forbid")

    worker: Name
    task: Name = "default"
    run: Name | None = None
    averages: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    every: Annotated[int, Field(ge=1, le=10**9)] = 1
    skip: Annotated[tuple[VersionId, ...], Field(max_length=1000)] = ()
    lease_s: Annotated[float, Field(ge=1, le=900, allow_inf_nan=False)] = LEASE_S
    poll_s: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 1.0
    version: VersionId | None = None

    @model_validator(mode="after")
    def _version_has_names(self) -> AskIn:
        if self.version is not None and (self.run is None or len(self.averages) != 1):
            raise ValueError("version needs run and averages, with the name of its average")
        return self


class LeaseOut(Out):
    """A claim to a version for a task; it ends with its result, or `expires_in_s` after the last heartbeat."""

    id: str
    task: str
    expires_in_s: float
    version: VersionOut


class GrantOut(Out):
    """A lease if a version is due. `held`: how many due versions other workers evaluate."""

    lease: LeaseOut | None
    held: int


class BeatOut(Out):
    """The lease was extended."""

    expires_in_s: float


@router.post(
    "",
    operation_id="ask_for_lease",
    status_code=201,
    responses={200: {"model": GrantOut, "description": "Nothing is due for this worker now"}},
)
async def ask(body: AskIn, response: Response, services: ServicesDep) -> GrantOut:
    """Lease a version to evaluate: a requested one, else one of the set in progress, else one of the newest set."""
    if body.run is not None:
        run_status(services, body.run)
        if body.version is not None:
            find_version(services, body.run, body.averages[0], body.version)
    wanted = Ask(body.worker, body.task, body.run, body.averages, body.lease_s, body.version)
    with store_errors():
        grant = await services.validations.ask(wanted, every=body.every, skip=frozenset(body.skip), poll_s=body.poll_s)
    if grant.lease is None:
        response.status_code = 200
        return GrantOut(lease=None, held=grant.held)
    return GrantOut(lease=_shown(services, grant.lease), held=grant.held)


@router.post("/{id}/heartbeat", operation_id="extend_lease", responses=_LOST)
async def heartbeat(id: str, services: ServicesDep) -> BeatOut:
    """Extend a lease. 410: it has ended, or it expired and another worker has the version."""
    with store_errors():
        extended = await services.validations.beat(id)
    if extended is None:
        raise _lost(id)
    return BeatOut(expires_in_s=extended.lease_s)


@router.post(
    "/{id}/result",
    operation_id="settle_lease",
    status_code=201,
    responses={200: {"model": MetricsRowOut, "description": "Replaced the earlier report of this worker"}, **_LOST},
)
async def result(id: str, body: FindingIn, response: Response, services: ServicesDep) -> MetricsRowOut:
    """End a lease by its result. A late result counts unless another worker has taken the version over."""
    finding = Finding(body.metrics, body.error, body.samples, body.seconds, body.missing)
    with store_errors():
        settled = await services.validations.settle(id, finding)
    if settled is None:
        raise _lost(id)
    report, first = settled
    if not first:
        response.status_code = 200
    return row_of(report)


@router.delete("/{id}", operation_id="give_lease_back", status_code=204)
async def give_back(id: str, services: ServicesDep) -> None:
    """End a lease without a result: other workers may have the version at once."""
    with store_errors():
        await services.validations.give_back(id)


def _shown(services: Services, lease: Lease) -> LeaseOut:
    subject = lease.subject
    version = find_version(services, subject.run, subject.average, subject.version)
    return LeaseOut(
        id=lease.id, task=lease.task, expires_in_s=lease.lease_s, version=VersionOut.model_validate(version)
    )


def _lost(lease_id: str) -> Problem:
    detail = f"lease {lease_id[:60]!r} has ended, or it expired and another worker has its version: ask for another"
    return Problem(Code.LEASE_LOST, detail)
