"""Evaluation metrics: report them for a version, list them for a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from fastapi import APIRouter
from starlette.responses import Response

from ema_server.evaluation.metric_store import MetricStoreError, Report, Subject
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias, run_status
from ema_server.http.schemas import MetricsOut, MetricsRowOut, ReportIn
from ema_server.http.services import Services, ServicesDep
from ema_server.storage.records import rfc3339

Result = TypeVar("Result")

router = APIRouter(prefix="/v1/runs/{run}", tags=["metrics"])


@router.post(
    "/averages/{average}/versions/{id}/metrics",
    operation_id="report_metrics",
    status_code=201,
    responses={200: {"model": MetricsRowOut, "description": "Replaced the earlier report of this worker"}},
)
async def report(
    run: str, average: str, id: str, body: ReportIn, response: Response, services: ServicesDep
) -> MetricsRowOut:
    """Report the metrics (or the failure) of one immutable version for a task."""
    subject = await _find_subject(services, run, average, id)
    at = rfc3339(time.time())
    finding = (body.metrics, body.error, body.samples, body.seconds)
    row = Report(subject, body.task, body.worker, *finding, at, body.missing)
    if not await _answer(services.metrics.add(row)):
        response.status_code = 200
    return row_of(row)


@router.get("/metrics", operation_id="list_metrics")
async def list_metrics(run: str, services: ServicesDep) -> MetricsOut:
    """Every report of the run's versions, by step, average, task and worker."""
    reports = await _answer(services.metrics.reports(run_status(services, run).run))
    return MetricsOut(metrics=tuple(row_of(each) for each in reports))


async def _find_subject(services: Services, run: str, average: str, rev: str) -> Subject:
    """The version that the report is about: one that exists, or one that was downloaded and has been pruned since."""
    if is_alias(rev):
        version = find_version(services, run, average, rev)
        detail = f"{rev!r} is an alias and may move: report on the version that was evaluated, now {version.id}"
        raise Problem(Code.ALIAS_NOT_ALLOWED, detail)
    run_status(services, run)
    known = await _answer(services.metrics.find(run, average, rev))
    if known is not None:
        return known
    version = find_version(services, run, average, rev)
    return Subject(run, average, version.id, version.step)


def row_of(report: Report) -> MetricsRowOut:
    """The JSON of a report."""
    return MetricsRowOut(
        version=report.subject.version,
        average=report.subject.average,
        step=report.subject.step,
        task=report.task,
        worker=report.worker,
        metrics=report.metrics,
        missing=report.missing,
        error=report.error,
        samples=report.samples,
        seconds=report.seconds,
        at=report.at,
    )


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn errors of the database into problems."""
    try:
        yield
    except MetricStoreError as error:
        raise Problem(Code.METRICS_UNAVAILABLE, str(error)) from error


async def _answer(future: Future[Result]) -> Result:
    with store_errors():
        return await asyncio.wrap_future(future)
