"""Counters count, every reject code is there from the start, and a silent thread grows old."""

from __future__ import annotations

import threading

from ema_proto.errors import RejectCode
from ema_server.telemetry import Counter, Gauge, Telemetry


def test_counts_from_several_threads_add_up() -> None:
    telemetry = Telemetry()

    def count() -> None:
        for _ in range(2000):
            telemetry.count(Counter.INGEST_BYTES, 3)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert telemetry.counters()[Counter.INGEST_BYTES] == 24_000


def test_everything_is_there_from_the_start_at_zero() -> None:
    telemetry = Telemetry()

    assert telemetry.counters() == dict.fromkeys(Counter, 0)
    assert telemetry.gauges() == dict.fromkeys(Gauge, 0)
    assert telemetry.rejects() == dict.fromkeys(RejectCode, 0)


def test_what_is_handed_out_is_a_copy() -> None:
    telemetry = Telemetry()
    telemetry.counters()[Counter.JOINS] = 7
    telemetry.reject(RejectCode.EVICTED)
    telemetry.set(Gauge.SESSIONS, 2)

    assert telemetry.counters()[Counter.JOINS] == 0
    assert telemetry.rejects()[RejectCode.EVICTED] == 1
    assert telemetry.gauges()[Gauge.SESSIONS] == 2


def test_a_thread_is_as_old_as_its_last_beat() -> None:
    now = 5.0
    telemetry = Telemetry(lambda: now)
    assert telemetry.age_s("averager") is None
    telemetry.beat("averager")
    now = 7.5

    assert telemetry.age_s("averager") == 2.5
