"""Counters of the whole process, as plain ints, and the pulse of its threads. Who renders them is not known here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

from ema_proto.errors import RejectCode


class Counter(StrEnum):
    """What is counted, since the process started. Times are in nanoseconds."""

    CONNECTIONS = "connections"
    JOINS = "joins"
    CHUNKS = "chunks"
    INGEST_BYTES = "ingest_bytes"
    SNAPSHOTS = "snapshots"
    UPDATES = "updates"
    UPDATE_NS = "update_ns"
    QUARANTINED = "quarantined"
    GENERATIONS = "generations"
    GENERATION_BYTES = "generation_bytes"
    GENERATION_NS = "generation_ns"
    GENERATION_FAILURES = "generation_failures"


class Gauge(StrEnum):
    """What goes up and down."""

    SESSIONS = "sessions"
    SLOT_BYTES = "slot_bytes"
    INBOX = "inbox"


class Telemetry:
    """Thread-safe counters, gauges, rejects by code, and heartbeats of threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(Counter, 0)
        self._gauges = dict.fromkeys(Gauge, 0)
        self._rejects = dict.fromkeys(RejectCode, 0)
        self._beats: dict[str, float] = {}

    def count(self, counter: Counter, amount: int = 1) -> None:
        """Add `amount` to a counter."""
        with self._lock:
            self._counters[counter] += amount

    def set(self, gauge: Gauge, value: int) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[gauge] = value

    def reject(self, code: RejectCode) -> None:
        """Count a REJECT that was sent."""
        with self._lock:
            self._rejects[code] += 1

    def counters(self) -> dict[Counter, int]:
        """A copy of all counters."""
        with self._lock:
            return dict(self._counters)

    def gauges(self) -> dict[Gauge, int]:
        """A copy of all gauges."""
        with self._lock:
            return dict(self._gauges)

    def rejects(self) -> dict[RejectCode, int]:
        """A copy of the rejects, every code present."""
        with self._lock:
            return dict(self._rejects)

    def beat(self, thread_name: str) -> None:
        """Say that a thread is alive."""
        now = self._clock()
        with self._lock:
            self._beats[thread_name] = now

    def age_s(self, thread_name: str) -> float | None:
        """Seconds since a thread's last beat; None when it has never beaten."""
        with self._lock:
            beat = self._beats.get(thread_name)
        return None if beat is None else self._clock() - beat
