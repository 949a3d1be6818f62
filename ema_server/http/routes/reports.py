"""Reports of workers: checks what they are about, keeps them, and reads them back without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

from ema_server.evaluation.metric_store import MetricStoreError, Report, Subject
from ema_server.http.problems import Code, Problem
from ema_server.http.resolve import find_version, is_alias
from ema_server.http.schemas import MetricsRowOut, ReportIn
from ema_server.http.services import Services

Result = TypeVar("Result")


async def keep_report(services: Services, subject: Subject, body: ReportIn) -> tuple[MetricsRowOut, bool]:
    """Keep what a worker said; returns the row and whether it is the first of its version, task and worker.

    Raises:
        Problem: the row could not be written.
    """
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    report = Report(subject, body.task, body.worker, body.metrics, body.error, body.samples, body.seconds, at)
    return row_of(report), await answer(services.metrics.add(report))


async def find_subject(services: Services, run: str, average: str, rev: str) -> Subject:
    """What the report is about: a version that exists, or one that was handed out and has been pruned since.

    Raises:
        Problem: `rev` is an alias, or there never was such a version.
    """
    if is_alias(rev):
        version = find_version(services, run, average, rev)
        detail = f"{rev!r} is an alias and may move: report on the version that was evaluated, now {version.id}"
        raise Problem(Code.ALIAS_NOT_ALLOWED, detail)
    known = await answer(services.metrics.find(run, average, rev))
    if known is not None:
        return known
    version = find_version(services, run, average, rev)
    return Subject(run, average, version.id, version.step)


async def list_reports(services: Services, run: str) -> tuple[MetricsRowOut, ...]:
    """All rows of a run.

    Raises:
        Problem: they could not be read.
    """
    return tuple(row_of(report) for report in await answer(services.metrics.reports(run)))


def row_of(report: Report) -> MetricsRowOut:
    """The JSON of a report."""
    return MetricsRowOut(
        version=report.subject.version,
        average=report.subject.average,
        step=report.subject.step,
        task=report.task,
        worker=report.worker,
        metrics=report.metrics,
        error=report.error,
        samples=report.samples,
        seconds=report.seconds,
        at=report.at,
    )


async def answer(future: Future[Result]) -> Result:
    """What the database answers, or the problem that it cannot."""
    with store_errors():
        return await asyncio.wrap_future(future)


@contextmanager
def store_errors() -> Iterator[None]:
    """Errors of the database as problems."""
    try:
        yield
    except MetricStoreError as error:
        raise Problem(Code.METRICS_UNAVAILABLE, str(error)) from error
