"""Counters and gauges of the server for Prometheus, and the heartbeats of its threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

from ema_proto.errors import RejectCode

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series and say only when the process began


class Telemetry:
    """Metrics in a registry of their own, and the time of each thread's last heartbeat. Safe from any thread.

    Labels are bounded: reject codes, routes, statuses; never a step, a version or a worker.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        self.connections = Counter("ema_connections", "Connections that trainers opened", registry=registry)
        self.joins = Counter("ema_joins", "Sessions that joined a run", registry=registry)
        self.sessions = Gauge("ema_sessions", "Trainers that own a run now", registry=registry)
        self.chunks = Counter("ema_chunks", "Chunks received", registry=registry)
        self.ingest_bytes = Counter("ema_ingest_bytes", "Snapshot bytes received", registry=registry)
        self.snapshots = Counter("ema_snapshots", "Whole snapshots received", registry=registry)
        self.slot_bytes = Gauge("ema_slot_bytes", "Memory held by slots", registry=registry)
        self.shared_slot_bytes = Gauge(
            "ema_shared_slot_bytes", "Memory of trainers that the server reads in place", registry=registry
        )
        self.inbox_jobs = Gauge("ema_inbox_jobs", "Jobs waiting for the averager", registry=registry)
        self.updates = Counter("ema_updates", "Snapshots applied to the averages", registry=registry)
        self.update_seconds = Counter("ema_update_seconds", "Time spent applying snapshots", registry=registry)
        self.quarantined = Counter("ema_quarantined", "Snapshots refused because of NaN or Inf", registry=registry)
        self.rejects = Counter("ema_rejects", "Refusals sent to trainers", ["code"], registry=registry)
        for code in RejectCode:
            self.rejects.labels(code.value)  # every code is exposed from the start, at zero
        self.generations = Counter("ema_generations", "Generations made durable", registry=registry)
        self.generation_bytes = Counter(
            "ema_generation_bytes", "Bytes of the generations made durable", registry=registry
        )
        self.generation_seconds = Counter(
            "ema_generation_seconds", "Time from the first byte to durable, over all generations", registry=registry
        )
        self.generation_failures = Counter(
            "ema_generation_failures", "Generations that could not be written", registry=registry
        )
        self.internal_errors = Counter(
            "ema_internal_errors",
            "Unexpected errors of the averager and the publisher, each with a traceback in the log",
            registry=registry,
        )
        self.http_requests = Counter("ema_http_requests", "HTTP responses", ["route", "code"], registry=registry)
        self._clock = clock
        self._lock = threading.Lock()
        self._beats: dict[str, float] = {}

    def beat(self, thread_name: str) -> None:
        now = self._clock()
        with self._lock:
            self._beats[thread_name] = now

    def age_s(self, thread_name: str) -> float | None:
        """Seconds since a thread's last heartbeat, None if it has had none."""
        with self._lock:
            beat = self._beats.get(thread_name)
        return None if beat is None else self._clock() - beat
