"""`GET /metrics`: counters, gauges, the status of every run and its newest evaluation, in Prometheus' text format."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from ema_proto.wire.messages import SHM, ZMQ
from ema_server.evaluation.metric_store import MetricStoreError, Report
from ema_server.http.services import Services, ServicesDep
from ema_server.publishing.ring import Ring
from ema_server.runs.ranks import RanksStatus
from ema_server.runs.status_store import RunState, RunStatus

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
VALUES_MAX = 500  # evaluation metrics of one run: users choose their names
_STORE_S = 2.0  # less than a scrape may take

router = APIRouter(tags=["health"])


@router.get("/metrics", operation_id="get_prometheus", response_class=Response)
async def metrics(services: ServicesDep) -> Response:
    """Counters and gauges in Prometheus' text format."""
    return Response(render(services, await newest_reports(services)), media_type=MEDIA_TYPE)


async def newest_reports(services: Services) -> tuple[Report, ...] | None:
    """The newest evaluation of every average and task; None if the database cannot be read, or not in time."""
    try:
        async with asyncio.timeout(_STORE_S):
            return await asyncio.wrap_future(services.metrics.newest())
    except (MetricStoreError, TimeoutError):
        return None  # exposed as ema_evaluations_readable 0


def render(services: Services, reports: tuple[Report, ...] | None) -> bytes:
    """The whole exposition."""
    statuses = CollectorRegistry(auto_describe=False)
    statuses.register(_Statuses(services, reports))
    return generate_latest(services.telemetry.registry) + generate_latest(statuses)


class _Statuses(Collector):
    """The status of every run, read at the moment of a scrape. Labels are runs, averages, names of metrics, ranks."""

    def __init__(self, services: Services, reports: tuple[Report, ...] | None) -> None:
        self._services = services
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        labels = {"version": _release(), "kernel": self._services.kernel}
        yield InfoMetricFamily("ema_build", "Release of the server, and the averaging kernel", labels)
        statuses = self._services.statuses.all()
        yield from _runs(statuses)
        on_disk = {status.run: self._services.usage.get(status.run) for status in statuses}
        yield _by_run("ema_run_disk_bytes", "Disk space of the run's files, as last measured", on_disk)
        yield _lanes({status.run: self._services.lanes.get(status.run) for status in statuses})
        yield from _ranks({status.run: self._services.ranks.get(status.run) for status in statuses})
        yield from _rings(statuses, self._services.deriving.ring)
        yield from _averages(statuses)
        yield _readable(self._reports)
        yield from _evaluations({status.run: self._values(status) for status in statuses})

    def _values(self, status: RunStatus) -> list[tuple[str, str, float, int]]:
        """Average, metric, newest value and its step, those of averages that the run has now."""
        kept = (average.name for average in status.averages)
        averages = (*kept, *self._services.catalog.derived_averages(status.run))
        by_average: dict[str, list[Report]] = {}
        for report in self._reports or ():
            if report.subject.run == status.run:
                by_average.setdefault(report.subject.average, []).append(report)
        return [
            (average, name, value, report.subject.step)
            for average in averages
            for report in by_average.get(average, ())
            for name, value in sorted(_named(report).items())
        ]


def _named(report: Report) -> dict[str, float]:
    """The metrics of a report by the names that `ema metrics` gives them; a missing one is NaN or infinite."""
    prefix = "" if report.task == "default" else f"{report.task}/"
    missing = {name: float(why) if why in ("inf", "-inf") else math.nan for name, why in report.missing.items()}
    return {prefix + name: value for name, value in (report.metrics | missing).items()}


def _readable(reports: tuple[Report, ...] | None) -> Metric:
    text = "0 if the results of evaluations could not be read"
    return GaugeMetricFamily("ema_evaluations_readable", text, value=int(reports is not None))


def _evaluations(found: Mapping[str, Sequence[tuple[str, str, float, int]]]) -> Iterator[Metric]:
    labels = ["run", "average", "metric"]
    values = GaugeMetricFamily("ema_version_metric", "Newest value of an evaluation metric", labels=labels)
    steps = GaugeMetricFamily("ema_version_metric_step", "Step of the version with that value", labels=labels)
    for run, rows in found.items():
        for average, name, value, step in rows[:VALUES_MAX]:
            values.add_metric([run, average, name], value)
            steps.add_metric([run, average, name], step)
    yield values
    yield steps
    omitted = {run: max(0, len(rows) - VALUES_MAX) for run, rows in found.items()}
    text = f"Evaluation metrics of the run beyond the first {VALUES_MAX}, which are not exposed"
    yield _by_run("ema_run_version_metrics_omitted", text, omitted)


def _runs(statuses: tuple[RunStatus, ...]) -> Iterator[Metric]:
    states = GaugeMetricFamily("ema_run_state", "1 for the state that the run is in", labels=["run", "state"])
    for status in statuses:
        for state in RunState:
            states.add_metric([status.run, state.value], int(status.state == state))
    yield states
    yield _by_run("ema_run_step", "Last applied step", {s.run: s.step for s in statuses})
    yield _by_run("ema_run_published_step", "Last durable step", {s.run: s.published_step for s in statuses})
    yield _by_run("ema_run_steps_per_second", "Applied steps per second", {s.run: s.steps_per_second for s in statuses})
    yield _by_run("ema_run_snapshot_bytes", "Length of a snapshot", {s.run: s.snapshot_bytes for s in statuses})
    yield _by_run("ema_run_memory_bytes", "Memory of the run's averages", {s.run: s.memory_bytes for s in statuses})
    yield _by_run("ema_run_publish_failing", "1 while it cannot publish", {s.run: _failing(s) for s in statuses})
    yield _by_run("ema_run_applied_snapshots", "Snapshots applied since it began", {s.run: s.applied for s in statuses})
    yield _by_run("ema_run_gap_steps", "Steps that were due and not applied", {s.run: s.gap_steps for s in statuses})
    yield _by_run("ema_run_quarantined_snapshots", "Snapshots refused", {s.run: s.quarantined for s in statuses})


def _lanes(found: Mapping[str, str | None]) -> Metric:
    text = "1 for the lane by which the trainer sends snapshots: shared memory, or the socket"
    family = GaugeMetricFamily("ema_run_lane", text, labels=["run", "lane"])
    for run, lane in found.items():
        for each in (SHM, ZMQ):
            if lane is not None:
                family.add_metric([run, each], int(lane == each))
    return family


def _ranks(found: Mapping[str, RanksStatus | None]) -> Iterator[Metric]:
    several = {run: ranks for run, ranks in found.items() if ranks is not None}
    yield _by_run("ema_run_world", "Ranks of the sharded trainer", {run: ranks.world for run, ranks in several.items()})
    present = {run: ranks.present for run, ranks in several.items()}
    yield _by_run("ema_run_ranks_present", "Ranks of the sharded trainer that are not missing", present)
    text = "Steps of a sharded trainer that are a gap because of this rank"
    dropped = CounterMetricFamily("ema_run_dropped_steps", text, labels=["run", "rank", "reason"])
    for run, ranks in several.items():
        for each in ranks.dropped:
            dropped.add_metric([run, "other" if each.rank is None else str(each.rank), each.reason], each.steps)
    yield dropped


def _rings(statuses: tuple[RunStatus, ...], ring: Ring) -> Iterator[Metric]:
    rings = {status.run: ring.status(status.run) for status in statuses}
    kept = {run: 0 if found is None else found.snapshots for run, found in rings.items()}
    failing = {run: int(found is not None and found.error is not None) for run, found in rings.items()}
    yield _by_run("ema_run_ring_snapshots", "Snapshots of power averages kept for synthesis", kept)
    yield _by_run("ema_run_ring_failing", "1 while no more can be kept", failing)


def _by_run(name: str, text: str, values: Mapping[str, int | float | None]) -> Metric:
    """A gauge, because a rewind takes steps and counts back. Runs without a value are left out."""
    family = GaugeMetricFamily(name, text, labels=["run"])
    for run, value in values.items():
        if value is not None:
            family.add_metric([run], value)
    return family


def _averages(statuses: tuple[RunStatus, ...]) -> Iterator[Metric]:
    steps = GaugeMetricFamily("ema_average_step", "Last step of the average", labels=["run", "average"])
    updates = GaugeMetricFamily("ema_average_updates", "Updates in the average", labels=["run", "average"])
    for status in statuses:
        for average in status.averages:
            updates.add_metric([status.run, average.name], average.updates)
            if average.step is not None:
                steps.add_metric([status.run, average.name], average.step)
    yield steps
    yield updates


def _failing(status: RunStatus) -> int:
    return int(status.publish_error is not None)


def _release() -> str:
    try:
        return version("ema-sidecar")
    except PackageNotFoundError:
        return "unknown"
