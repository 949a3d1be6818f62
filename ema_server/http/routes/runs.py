"""Routes for runs: which there are, and how each one stands."""

from __future__ import annotations

from fastapi import APIRouter

from ema_server.http.resolve import run_status, shown_run
from ema_server.http.schemas import RunOut, RunsOut
from ema_server.http.services import Services


def router(services: Services) -> APIRouter:
    """`/v1/runs` and `/v1/runs/{run}`."""
    routes = APIRouter(prefix="/v1", tags=["runs"])

    @routes.get("/runs", operation_id="list_runs")
    async def list_runs() -> RunsOut:
        """All runs, by name."""
        return RunsOut(runs=tuple(shown_run(services, status) for status in services.statuses.all()))

    @routes.get("/runs/{run}", operation_id="get_run")
    async def get_run(run: str) -> RunOut:
        """State, steps, rates, gaps and averages of one run."""
        return shown_run(services, run_status(services, run))

    return routes
