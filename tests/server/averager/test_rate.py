"""The steps per second that a run's status shows."""

from __future__ import annotations

import pytest

from ema_proto.limits import SLOTS
from ema_server.averager.active_run import Rate


def test_rate_is_the_mean_over_the_samples() -> None:
    rate = Rate()
    assert rate.steps_per_second() is None
    for second in range(4):
        rate.add(float(second), 10 * second)

    assert rate.steps_per_second() == pytest.approx(10.0)


def test_rate_begins_again_after_a_reconnect_without_the_snapshots_that_waited() -> None:
    rate = Rate()
    rate.add(0.0, 90)
    rate.reset(reconnected=True)
    for slot in range(SLOTS):  # taken before the outage, and sent at once after it
        rate.add(60.0 + slot / 1000, 100 + slot)
    for second in range(3):
        rate.add(61.0 + second, 700 + 10 * second)

    assert rate.steps_per_second() == pytest.approx(10.0)
