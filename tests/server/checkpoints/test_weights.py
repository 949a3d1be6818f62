"""The weight of each checkpoint: that of a snapshot with gaps on a server, except where checkpoints are counted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.averages.rules import AverageSpec, Ema, Uniform, Window
from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import UNKNOWN, needed_of
from ema_server.checkpoints.errors import ArgumentError
from ema_server.checkpoints.weights import Weighing, weigh, weigh_by
from ema_server.rules.contributions import shares_of
from ema_server.rules.ledger import Ledger
from support.any_rule import short_rules

_STEPS = (500, 1000, 1500, 2000, 2500)

_steps = st.lists(st.integers(1, 200), min_size=2, max_size=12, unique=True).map(sorted)
_windows = st.builds(Window, st.integers(1, 8), st.integers(2, 40))


def _shares(spec: str, steps: tuple[int, ...] = _STEPS) -> list[float]:
    return [round(share, 6) for share in weigh(parse_average(spec), steps).shares]


def _counts_checkpoints(rule: AverageSpec) -> bool:
    return isinstance(rule, Uniform | Window) and rule.every == 1


@given(short_rules(0) | _windows, _steps)
def test_shares_are_those_of_a_run_with_gaps_on_a_server(rule: AverageSpec, steps: list[int]) -> None:
    if needed_of(rule) is not None or _counts_checkpoints(rule):
        return
    ledger = Ledger(origin=0)
    for step in steps:
        ledger.append(step)

    expected = dict(shares_of(rule, ledger, lambda _: UNKNOWN))

    assert weigh(rule, steps).shares == pytest.approx([expected.get(step, 0.0) for step in steps], abs=1e-15)


@given(short_rules(0) | _windows | st.builds(Window, st.integers(1, 8)), _steps)
def test_weights_begin_with_one_replacement_and_shares_add_up_to_1(rule: AverageSpec, steps: list[int]) -> None:
    if needed_of(rule) is not None:
        return
    weighing = weigh(rule, steps)

    begins = weighing.weights.index(None)
    assert weighing.weights.count(None) == 1
    assert set(weighing.weights[:begins]) <= {0.0}
    assert math.fsum(weighing.shares) == pytest.approx(1.0)
    assert weighing.shares[weighing.newest] > 0 or isinstance(rule, Ema)


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("window:5", [0.2] * 5),
        ("window:2", [0, 0, 0, 0.5, 0.5]),
        ("window:9", [0.2] * 5),
        ("window:2,every=1000", [0, 0.5, 0, 0.5, 0]),
        ("window:1,every=5000", [0, 0, 0, 0, 1]),
        ("swa", [0.2] * 5),
        ("swa:start=1500", [0, 0, 1 / 3, 1 / 3, 1 / 3]),
        ("swa:start=9000", [0, 0, 0, 0, 1]),
        ("swa:every=1000", [0, 0.5, 0, 0.5, 0]),
        ("ema:half_life=500", [0.0625, 0.0625, 0.125, 0.25, 0.5]),
        ("ema:half_life=500,update_after=1000", [0, 0, 0.25, 0.25, 0.5]),
        ("power:gamma=0", [0.2] * 5),
        ("power:gamma=1", [0.04, 0.12, 0.2, 0.28, 0.36]),
        ("wsd:start=500,steps=2000", [0, 0.25, 0.25, 0.25, 0.25]),
        ("wsd:start=1000,steps=1000", [0, 0, 0.5, 0.5, 0]),
        ("wsd:start=1000,steps=1000,shape=sqrt", [0, 0, 0.707107, 0.292893, 0]),
        ("raw", [0, 0, 0, 0, 1]),
    ],
)
def test_each_rule_on_every_500th_step(spec: str, shares: list[float]) -> None:
    assert _shares(spec) == pytest.approx(shares, abs=1e-6)


def test_oldest_checkpoint_stands_for_all_steps_before_it() -> None:
    assert _shares("power:gamma=0", (4000, 4500, 5000)) == [0.8, 0.1, 0.1]
    assert _shares("window:3", (4000, 4500, 5000)) == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_checkpoint_of_step_0_is_that_of_before_the_first_step() -> None:
    assert _shares("power:gamma=0", (0, 500, 1000)) == [0, 0.5, 0.5]
    assert _shares("ema:half_life=500", (0, 500, 1000)) == [0, 0.5, 0.5]
    assert _shares("ema:half_life=500,init=start", (0, 500, 1000)) == [0.25, 0.25, 0.5]
    assert _shares("window:3", (0, 500, 1000)) == pytest.approx([1 / 3] * 3, abs=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8).filter(lambda numbers: sum(numbers) > 0))
def test_given_weights_are_divided_by_their_sum(numbers: list[float]) -> None:
    weighing = weigh_by(numbers, range(1, len(numbers) + 1))

    assert weighing.shares == pytest.approx([number / sum(numbers) for number in numbers], abs=1e-12)


@pytest.mark.parametrize("numbers", [[1.0], [1.0, -0.5], [1.0, math.nan], [1.0, math.inf], [0.0, 0.0]])
def test_weights_that_make_no_mean_are_refused(numbers: list[float]) -> None:
    with pytest.raises(ArgumentError, match="--weights"):
        weigh_by(numbers, [1, 2])


def test_half_life_in_samples_is_refused() -> None:
    with pytest.raises(ArgumentError, match="give the half-life in steps"):
        weigh(parse_average("ema:half_life_samples=500"), _STEPS)


def test_bema_is_refused() -> None:
    with pytest.raises(ArgumentError, match="it needs a server"):
        weigh(parse_average("bema"), _STEPS)


def test_copied_tensors_come_from_the_newest_checkpoint_that_counts() -> None:
    def newest(spec: str) -> int:
        weighing: Weighing = weigh(parse_average(spec), _STEPS)
        return weighing.steps[weighing.newest]

    assert newest("window:2") == 2500
    assert newest("window:2,every=1000") == 2000
    assert newest("wsd:start=1000,steps=1000") == 2000
