"""`GET /metrics`: the server's counters and gauges, and the status of every run, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from ema_server.http.services import Services, ServicesDep
from ema_server.publishing.ring import Ring
from ema_server.runs.status_store import RunState, RunStatus

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter(tags=["health"])


@router.get("/metrics", operation_id="get_prometheus", response_class=Response)
async def metrics(services: ServicesDep) -> Response:
    """Counters and gauges in Prometheus' text format."""
    return Response(render(services), media_type=MEDIA_TYPE)


def render(services: Services) -> bytes:
    """The whole exposition."""
    statuses = CollectorRegistry(auto_describe=False)
    statuses.register(_Statuses(services))
    return generate_latest(services.telemetry.registry) + generate_latest(statuses)


class _Statuses(Collector):
    """The status of every run, read at the moment of a scrape. Labels are runs and averages."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        labels = {"version": _release(), "kernel": self._services.kernel}
        yield InfoMetricFamily("ema_build", "Release of the server, and the averaging kernel", labels)
        statuses = self._services.statuses.all()
        yield from _runs(statuses)
        yield from _rings(statuses, self._services.deriving.ring)
        yield from _averages(statuses)


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
