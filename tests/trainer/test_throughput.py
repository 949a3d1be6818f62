"""The line that says, after the first snapshots, whether every step can be kept."""

from __future__ import annotations

import logging

import pytest

from trainer_client.throughput import Throughput

_MB = 1_000_000


@pytest.fixture(autouse=True)
def _at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ema")


def _run(
    throughput: Throughput, applying_s: float, *, step_s: float = 0.25, copy_s: float = 0.05, count: int = 40
) -> int:
    """Train with steps of `step_s` beside a copy of `copy_s`; how many snapshots were due when the line was logged."""
    now = blocked_s = 0.0
    for index in range(count):
        throughput.due(now, blocked_s)
        if throughput.log([applying_s] * min(index, 16)):
            return index
        throughput.copied(copy_s)
        now, blocked_s = now + step_s + copy_s, blocked_s + copy_s
    return count


def test_server_that_keeps_up_is_reported_with_size_rate_and_times(caplog: pytest.LogCaptureFixture) -> None:
    logged_at = _run(Throughput(400 * _MB, 1, "zmq"), 0.2)

    assert logged_at < 20
    assert [record.getMessage() for record in caplog.records] == [
        "ema: a snapshot has 400 MB; the training thread spends 50 ms on one (8 GB/s), sending it over zmq and "
        "averaging it take 200 ms, and one is due every 300 ms: every step can be kept"
    ]


@pytest.mark.parametrize(
    ("every", "applying_s", "verdict"),
    [
        (1, 0.31, "not all can be kept; every=2 can"),
        (1, 0.89, "not all can be kept; every=3 can"),
        (4, 0.29, "every=4 can be kept"),
        (4, 0.4, "not all can be kept; every=6 can"),
    ],
)
def test_every_that_would_be_kept_is_named(
    every: int, applying_s: float, verdict: str, caplog: pytest.LogCaptureFixture
) -> None:
    _run(Throughput(400 * _MB, every, "zmq"), applying_s)

    assert caplog.records[-1].getMessage().endswith(verdict)


def test_first_steps_which_are_slow_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    throughput = Throughput(_MB, 1, "zmq")
    for now in (0.0, 60.0, 90.0):
        throughput.due(now, 0.0)
        throughput.copied(0.05)
    now = 91.0
    while not throughput.log([0.4] * 4):
        throughput.due(now, 0.0)
        throughput.copied(0.05)
        now += 0.25

    assert "one is due every 300 ms" in caplog.records[-1].getMessage()


def test_time_in_which_the_loop_waits_for_a_slot_is_not_that_of_a_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    throughput = Throughput(_MB, 1, "zmq")
    for index in range(20):
        throughput.due(index * 1.0, index * 0.75)
        throughput.copied(0.05)

    assert throughput.log([1.0] * 4)
    assert caplog.records[-1].getMessage().endswith("one is due every 300 ms: not all can be kept; every=4 can")


def test_nothing_is_logged_before_enough_snapshots_were_applied(caplog: pytest.LogCaptureFixture) -> None:
    throughput = Throughput(_MB, 1, "zmq")
    for index in range(100):
        throughput.due(index * 1.0, 0.0)
        throughput.copied(0.05)

    assert not throughput.log([1.0] * 3)
    assert not caplog.records
