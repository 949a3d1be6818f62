"""Runs: list them, get one."""

from __future__ import annotations

from fastapi import APIRouter

from ema_server.http.resolve import run_status
from ema_server.http.schemas import RingOut, RunOut, RunsOut
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


def _shown(services: Services, status: RunStatus) -> RunOut:
    shown: RunOut = RunOut.model_validate(status)
    ring = services.deriving.ring.status(status.run)
    shown_ring = None if ring is None else RingOut.model_validate(ring)
    return shown.model_copy(update={"derived": services.catalog.derived_averages(status.run), "ring": shown_ring})
