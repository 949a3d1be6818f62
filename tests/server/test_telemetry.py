"""Heartbeats: a thread that stops sending them grows old."""

from __future__ import annotations

from ema_server.telemetry import Telemetry


def test_age_of_a_thread_is_the_time_since_its_last_beat() -> None:
    now = 5.0
    telemetry = Telemetry(lambda: now)
    assert telemetry.age_s("averager") is None
    telemetry.beat("averager")
    now = 7.5

    assert telemetry.age_s("averager") == 2.5
