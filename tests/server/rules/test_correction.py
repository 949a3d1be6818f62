"""A `bema` over any steps is that of a dense stream in which each missing step had the weights of the next snapshot."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.averages.rules import Bema
from ema_proto.averages.step_units import UNKNOWN
from ema_server.rules import correction
from ema_server.rules.contributions import shares_of
from ema_server.rules.correction import begins, correction_of
from ema_server.rules.ledger import Ledger
from ema_server.rules.weights import Span
from support.any_rule import any_bemas, short_bemas

_strides = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def _dense(rule: Bema, steps: list[int], origin: int) -> dict[int, float]:
    """The share of each snapshot, by the formula of arXiv 2508.00180 at every step from the first snapshot on."""
    moving: dict[int, float] = {}
    average: dict[int, float] = {}
    initial, then = 0, steps[0] - 1
    for now in steps:
        for step in range(then + 1, now + 1):
            time = step - origin
            if not moving or time <= rule.update_after:
                initial, moving, average = now, {now: 1.0}, {now: 1.0}
            elif (time - rule.update_after) % rule.every == 0:
                age = rule.lag + rule.multiplier * time
                newest, factor = max(age**-rule.ema_power, rule.min_weight), age**-rule.bias_power
                moving = {at: share * (1 - newest) for at, share in moving.items()}
                moving[now] = moving.get(now, 0.0) + newest
                average = dict(moving)
                average[now] = average.get(now, 0.0) + factor
                average[initial] = average.get(initial, 0.0) - factor
        then = now
    return average


@given(short_bemas(), _strides, st.integers(0, 20))
def test_shares_are_those_of_a_dense_stream(rule: Bema, strides: list[int], origin: int) -> None:
    ledger = Ledger(origin)
    steps = [origin + sum(strides[: number + 1]) for number in range(len(strides))]
    for step in steps:
        ledger.append(step)

    found = dict(shares_of(rule, ledger, lambda _: UNKNOWN))

    expected = _dense(rule, steps, origin)
    assert math.fsum(found.values()) == pytest.approx(1.0)
    for step in steps:
        assert found.get(step, 0.0) == pytest.approx(expected.get(step, 0.0), abs=1e-9), step


@given(short_bemas(), st.integers(1, 60), st.integers(1, 30))
def test_blends_of_the_old_average_give_the_new_one(rule: Bema, time: int, gap: int) -> None:
    span = Span(time, time + gap, 0)
    found = None if begins(rule, span) else correction_of(rule, span)
    if found is None:
        return
    moving, newest, initial = 3.0, -1.0, 7.0

    of_snapshot, of_initial = found.mix
    average = moving + of_snapshot * (newest - moving)
    average += of_initial * (initial - average)

    expected = moving + found.weight * (newest - moving) + found.factor * (newest - initial)
    assert average == pytest.approx(expected, abs=1e-12)


@given(
    any_bemas(),
    st.sampled_from([0, 7, 2**40]),
    st.sampled_from([0, 1, 5, 10**4, 2**52]),
    st.sampled_from([1, 2, 1000, 2**50]),
)
def test_every_valid_bema_has_a_correction_at_every_step(rule: Bema, origin: int, time: int, gap: int) -> None:
    span = Span(origin + time, origin + time + gap, origin)
    found = None if begins(rule, span) else correction_of(rule, span)

    assert found is None or (0.0 <= found.weight <= 1.0 and 0.0 <= found.factor <= 1.0)


def test_huge_gap_is_summed_in_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    age = correction._age

    def counted(rule: Bema, update: float) -> float:
        asked.append(update)
        return age(rule, update)

    monkeypatch.setattr(correction, "_age", counted)
    assert correction_of(Bema(every=1, ema_power=3.0), Span(10**6, 10**15, 0)) is not None

    assert len(asked) < 100_000


def test_rule_without_an_update_in_the_span_changes_nothing() -> None:
    rule = Bema(every=10, update_after=5)

    assert begins(rule, Span(4, 5, 0))
    assert not begins(rule, Span(5, 6, 0))
    assert correction_of(rule, Span(5, 14, 0)) is None
    assert correction_of(rule, Span(14, 15, 0)) is not None
