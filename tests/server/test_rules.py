"""The weight of a snapshot is one minus the product of the decays of the steps since the last one, in float64."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.specs import Ema, Raw
from ema_server.rules import weight_of


def _kept(rule: Ema, then: int, now: int) -> Fraction:
    """The product of timm's decays, multiplied out exactly."""
    kept = Fraction(1)
    for step in range(then + 1, now + 1):
        kept *= Fraction(_timms_decay(rule, step))
    return kept


def _timms_decay(rule: Ema, step: int) -> float:
    """ModelEmaV3.get_decay as timm's documentation states it: the first steps copy, then the curve between two ends."""
    since = step - rule.update_after - 1
    if since <= 0:
        return 0.0
    if rule.warmup is None:
        return rule.decay
    return max(min(1 - float((1 + since / rule.gamma) ** -rule.power), rule.decay), rule.min_decay)


@pytest.mark.parametrize(
    ("decay", "delta", "weight"),
    [
        (0.9, 1, 0.1),
        (0.9, 2, 0.19),
        (0.9999, 10, 1 - 0.99900045),
        (0.9999, 100, 1 - 0.99004934),
        (0.5, 60, 1.0),
        (0.0, 1, 1.0),
    ],
)
def test_known_weights_of_a_constant_decay(decay: float, delta: int, weight: float) -> None:
    for then in (0, 17):
        assert weight_of(Ema(decay), then, then + delta) == pytest.approx(weight, abs=5e-9)


@pytest.mark.parametrize(
    ("power", "step", "decay"),
    [
        (2 / 3, 2, 0.370039),
        (2 / 3, 3, 0.519250),
        (2 / 3, 10, 0.784557),
        (2 / 3, 100, 0.953584),
        (2 / 3, 1000, 0.990000),
        (2 / 3, 100_000, 0.999536),
        (0.75, 10, 0.822172),
        (0.75, 1000, 0.994377),
        (1.0, 4, 0.75),
    ],
)
def test_known_decays_of_the_warmup(power: float, step: int, decay: float) -> None:
    """Values tabulated from timm's formula; with power 1 it is the plain mean."""
    weight = weight_of(Ema(0.99999999, warmup="timm", power=power), step - 1, step)

    assert weight == pytest.approx(1 - decay, abs=6e-7)


def test_k_steps_at_once_weigh_as_much_as_k_single_ones() -> None:
    """Updates by the same weights: what is left of the old average is the product of what each step leaves."""
    single = weight_of(Ema(0.999), 4, 5)
    many = weight_of(Ema(0.999), 4, 254)

    assert single is not None
    assert many is not None
    assert 1 - many == pytest.approx((1 - single) ** 250, rel=1e-12)


@given(
    st.floats(0.3, 3.0),
    st.floats(0.2, 50.0),
    st.sampled_from([0.9, 0.99, 0.9999]),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.integers(0, 40),
    st.integers(0, 200),
    st.integers(1, 120),
)
def test_a_gap_in_the_warmup_weighs_the_exact_product(
    power: float, gamma: float, decay: float, least: float, update_after: int, then: int, delta: int
) -> None:
    rule = Ema(decay, "x", warmup="timm", gamma=gamma, power=power, min_decay=least, update_after=update_after)
    kept, weight = _kept(rule, then, then + delta), weight_of(rule, then, then + delta)

    if kept == 0:
        assert weight is None, "a step that copies leaves nothing of the old average"
    else:
        assert weight == pytest.approx(float(1 - kept), rel=1e-12)


@pytest.mark.parametrize("then", [1_000_000, 30_000_000])
def test_a_gap_far_into_the_warmup_weighs_the_product_within_a_part_in_a_hundred_million(then: int) -> None:
    """The reference takes every step on its own, summed without rounding (`math.fsum`)."""
    rule, delta = Ema(0.999999999, warmup="timm", power=0.9), 300_000
    left = math.fsum(math.log(_timms_decay(rule, step)) for step in range(then + 1, then + delta + 1))

    assert weight_of(rule, then, then + delta) == pytest.approx(-math.expm1(left), rel=1e-8)


@pytest.mark.parametrize("rule", [Ema(0.9999, update_after=3), Ema(0.9999, warmup="timm", update_after=3)])
def test_up_to_update_after_and_one_step_more_the_weights_are_copied(rule: Ema) -> None:
    assert [weight_of(rule, then, then + 1) is None for then in range(6)] == [True, True, True, True, False, False]
    assert weight_of(rule, 3, 10**6) is None
    assert weight_of(rule, 4, 5) == pytest.approx(1 - _timms_decay(rule, 5), rel=1e-12)


def test_without_a_warmup_and_update_after_the_first_step_is_weighed_like_any() -> None:
    assert weight_of(Ema(0.75), 0, 1) == 0.25


@pytest.mark.parametrize(
    "rule",
    [
        Ema(0.9999),
        Ema(0.9999, warmup="timm"),
        Ema(0.9999, warmup="timm", power=0.01),
        Ema(0.9999, warmup="timm", gamma=1e-30),
        Ema(1 - 2.0**-53, warmup="timm", gamma=1e12),
    ],
)
def test_a_huge_gap_takes_the_new_weights_and_no_huge_time(rule: Ema) -> None:
    """Bounded in steps of arithmetic; the clock only tells a bounded loop from one over 2**52 steps."""
    started = time.monotonic()

    assert weight_of(rule, 5, 2**52) == pytest.approx(1.0, abs=1e-6)
    assert time.monotonic() - started < 60


def test_raw_has_no_weight() -> None:
    assert weight_of(Raw(), 0, 7) is None


@pytest.mark.parametrize("now", [5, 2])
def test_an_update_follows_an_earlier_step(now: int) -> None:
    with pytest.raises(ValueError, match=f"time {now} is not above 5"):
        weight_of(Ema(0.9), 5, now)
