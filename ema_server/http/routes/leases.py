"""Routes for workers: ask for a version to evaluate, stay alive, hand in the result, or give it back."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ema_server.evaluation.leases import Ask, Finding, Lease
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, run_status
from ema_server.http.routes.lease_schemas import AskIn, BeatOut, GrantOut, LeaseOut
from ema_server.http.routes.reports import row_of, store_errors
from ema_server.http.schemas import FindingIn, MetricsRowOut, ProblemOut, VersionOut
from ema_server.http.services import Services

_LOST: dict[int | str, dict[str, object]] = {410: {"model": ProblemOut}}


def router(services: Services) -> APIRouter:
    """`/v1/leases` and below."""
    routes = APIRouter(prefix="/v1/leases", tags=["leases"])
    validations = services.validations

    @routes.post(
        "",
        operation_id="ask_for_lease",
        status_code=201,
        responses={200: {"model": GrantOut, "description": "Nothing is due for this worker now"}},
    )
    async def ask(body: AskIn, response: Response) -> GrantOut:
        """A version to evaluate: one that someone asked about, else the newest of an average without metrics."""
        if body.run is not None:
            run_status(services, body.run)
        wanted = Ask(body.worker, body.task, body.run, body.averages, body.lease_s)
        with store_errors():
            grant = await validations.ask(wanted, every=body.every, skip=frozenset(body.skip), poll_s=body.poll_s)
        if grant.lease is None:
            response.status_code = 200
            return GrantOut(lease=None, held=grant.held)
        return GrantOut(lease=_shown(services, grant.lease), held=grant.held)

    @routes.post("/{id}/heartbeat", operation_id="extend_lease", responses=_LOST)
    async def heartbeat(id: str) -> BeatOut:
        """Extend a lease. 410: it expired and another worker has the version, or it has ended."""
        with store_errors():
            extended = await validations.beat(id)
        if extended is None:
            raise _lost(id)
        return BeatOut(expires_in_s=extended.lease_s)

    @routes.post(
        "/{id}/result",
        operation_id="settle_lease",
        status_code=201,
        responses={200: {"model": MetricsRowOut, "description": "Replaced what this worker had reported"}, **_LOST},
    )
    async def result(id: str, body: FindingIn, response: Response) -> MetricsRowOut:
        """End a lease by its result. A late one counts as long as nobody has taken the version over."""
        with store_errors():
            settled = await validations.settle(id, Finding(body.metrics, body.error, body.samples, body.seconds))
        if settled is None:
            raise _lost(id)
        report, first = settled
        if not first:
            response.status_code = 200
        return row_of(report)

    @routes.delete("/{id}", operation_id="give_lease_back", status_code=204)
    async def give_back(id: str) -> None:
        """Let another worker have the version at once."""
        with store_errors():
            await validations.give_back(id)

    return routes


def _shown(services: Services, lease: Lease) -> LeaseOut:
    subject = lease.subject
    version = find_version(services, subject.run, subject.average, subject.version)
    return LeaseOut(
        id=lease.id, task=lease.task, expires_in_s=lease.lease_s, version=VersionOut.model_validate(version)
    )


def _lost(lease_id: str) -> Problem:
    detail = f"lease {lease_id[:60]!r} has ended, or it expired and another worker has its version: ask for another"
    return Problem(Code.LEASE_LOST, detail)
