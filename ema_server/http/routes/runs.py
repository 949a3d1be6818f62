"""Runs: list them, get one, delete one."""

from __future__ import annotations

from fastapi import APIRouter

from ema_server.http import commands
from ema_server.http.resolve import run_status
from ema_server.http.schemas import ProblemOut, RanksOut, RingOut, RunOut, RunsOut
from ema_server.http.services import Services, ServicesDep
from ema_server.runs.status_store import RunStatus

router = APIRouter(prefix="/v1", tags=["runs"])


@router.get("/runs", operation_id="list_runs")
async def list_runs(services: ServicesDep) -> RunsOut:
    """All runs, by name."""
    return RunsOut(runs=tuple(_shown(services, status) for status in services.statuses.all()))


@router.get("/runs/{run}", operation_id="get_run")
async def get_run(run: str, services: ServicesDep) -> RunOut:
    """State, steps, rates, gaps and averages of one run."""
    return _shown(services, run_status(services, run))


@router.delete(
    "/runs/{run}",
    operation_id="delete_run",
    status_code=204,
    responses={409: {"model": ProblemOut, "description": "A trainer streams the run"}},
)
async def delete_run(run: str, services: ServicesDep) -> None:
    """Delete a run that no trainer streams: generations, derived versions, ring, metrics and leases.

    Answers once that is durable. The disk space is free when the files are erased and running downloads have ended.
    """
    await commands.delete_run(services, run)


def _shown(services: Services, status: RunStatus) -> RunOut:
    shown: RunOut = RunOut.model_validate(status)
    ring = services.deriving.ring.status(status.run)
    shown_ring = None if ring is None else RingOut.model_validate(ring)
    derived, disk_bytes = services.catalog.derived_averages(status.run), services.usage.get(status.run)
    ranks = services.ranks.get(status.run)
    shown_ranks = None if ranks is None else RanksOut.model_validate(ranks)
    update = {"derived": derived, "ring": shown_ring, "disk_bytes": disk_bytes, "ranks": shown_ranks}
    return shown.model_copy(update=update | {"lane": services.lanes.get(status.run)})
