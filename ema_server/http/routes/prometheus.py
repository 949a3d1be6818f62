"""The state of the server for Prometheus. Comes in: statuses, telemetry, request counts; goes out: the text format.

Nothing is accumulated here: each scrape renders what the other threads have counted. Labels are bounded: runs,
averages, codes, routes; never a step, a version or a worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ema_server.http.services import Services
from ema_server.publishing.ring import Ring
from ema_server.runs.status_store import RunState, RunStatus
from ema_server.telemetry import Counter, Gauge

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COUNTERS: dict[Counter, tuple[str, str, float]] = {
    Counter.CONNECTIONS: ("ema_connections", "Connections that trainers opened", 1),
    Counter.JOINS: ("ema_joins", "Sessions that joined a run", 1),
    Counter.CHUNKS: ("ema_chunks", "Chunks received", 1),
    Counter.INGEST_BYTES: ("ema_ingest_bytes", "Snapshot bytes received", 1),
    Counter.SNAPSHOTS: ("ema_snapshots", "Whole snapshots received", 1),
    Counter.UPDATES: ("ema_updates", "Snapshots applied to the averages", 1),
    Counter.UPDATE_NS: ("ema_update_seconds", "Time spent applying snapshots", 1e-9),
    Counter.QUARANTINED: ("ema_quarantined", "Snapshots refused because of NaN or Inf", 1),
    Counter.GENERATIONS: ("ema_generations", "Generations made durable", 1),
    Counter.GENERATION_BYTES: ("ema_generation_bytes", "Bytes of the generations made durable", 1),
    Counter.GENERATION_NS: (
        "ema_generation_seconds",
        "Time from the first byte to durable, over all generations",
        1e-9,
    ),
    Counter.GENERATION_FAILURES: ("ema_generation_failures", "Generations that could not be written", 1),
}
_GAUGES: dict[Gauge, tuple[str, str]] = {
    Gauge.SESSIONS: ("ema_sessions", "Trainers that own a run now"),
    Gauge.SLOT_BYTES: ("ema_slot_bytes", "Memory held by slots"),
    Gauge.INBOX: ("ema_inbox_jobs", "Jobs waiting for the averager"),
}


def render(services: Services) -> bytes:
    """The whole exposition."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(services))
    return generate_latest(registry)


class _Snapshot(Collector):
    """Everything that is exposed, read at the moment of a scrape."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        labels = {"version": _release(), "kernel": self._services.kernel}
        yield InfoMetricFamily("ema_build", "Release of the server, and what it computes with", labels)
        yield from _process(self._services)
        statuses = self._services.statuses.all()
        yield from _runs(statuses)
        yield from _rings(statuses, self._services.deriving.ring)
        yield from _averages(statuses)


def _process(services: Services) -> Iterator[Metric]:
    counters, gauges = services.telemetry.counters(), services.telemetry.gauges()
    for counter, (name, text, factor) in _COUNTERS.items():
        yield CounterMetricFamily(name, text, value=counters[counter] * factor)
    for gauge, (name, text) in _GAUGES.items():
        yield GaugeMetricFamily(name, text, value=gauges[gauge])
    rejects = CounterMetricFamily("ema_rejects", "Refusals sent to trainers", labels=["code"])
    for code, count in services.telemetry.rejects().items():
        rejects.add_metric([code.value], count)
    yield rejects
    requests = CounterMetricFamily("ema_http_requests", "HTTP responses", labels=["route", "code"])
    for (route, status), count in services.requests.all().items():
        requests.add_metric([route, str(status)], count)
    yield requests


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
    steps = GaugeMetricFamily("ema_average_step", "Step the average stands at", labels=["run", "average"])
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
