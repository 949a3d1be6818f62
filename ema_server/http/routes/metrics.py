"""Routes for evaluation metrics: report them for a version, list them for a run."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ema_server.http.resolve import run_status
from ema_server.http.routes.reports import find_subject, keep_report, list_reports
from ema_server.http.schemas import MetricsOut, MetricsRowOut, ReportIn
from ema_server.http.services import Services


def router(services: Services) -> APIRouter:
    """`…/versions/{id}/metrics` and `/v1/runs/{run}/metrics`."""
    routes = APIRouter(prefix="/v1/runs/{run}", tags=["metrics"])

    @routes.post(
        "/averages/{average}/versions/{id}/metrics",
        operation_id="report_metrics",
        status_code=201,
        responses={200: {"model": MetricsRowOut, "description": "Replaced what this worker had reported before"}},
    )
    async def report(run: str, average: str, id: str, body: ReportIn, response: Response) -> MetricsRowOut:
        """Report the metrics (or the failure) of one immutable version for a task."""
        row, first = await keep_report(services, await find_subject(services, run, average, id), body)
        if not first:
            response.status_code = 200
        return row

    @routes.get("/metrics", operation_id="list_metrics")
    async def list_metrics(run: str) -> MetricsOut:
        """Every report of the run's versions, by step, average, task and worker."""
        return MetricsOut(metrics=await list_reports(services, run_status(services, run).run))

    return routes
