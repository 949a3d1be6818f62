"""Every rule, on streams with gaps, against a dense stream of single steps."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_proto.averages.rules import AverageSpec, Bema, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import StepUnits
from ema_server.rules import decays
from ema_server.rules.weights import Reach, Span, points, reach_now, weight_of
from support.any_rule import any_rules, short_rules
from support.dense import dense_shares

_STEP_UNITS = StepUnits(samples_per_step=32, steps_per_epoch=50)
_ORIGINS = (0, 1, 77, 500)
_ALL_BUT = 1 - 2.0**-53  # the largest decay there is: what it leaves out shows the warm-up alone


def _weight(rule: AverageSpec, then: int, now: int, origin: int = 0) -> float:
    """The share of the snapshot: 1 where it replaces the average."""
    weight = weight_of(rule, Span(then, now, origin), _STEP_UNITS)
    return 1.0 if weight is None else weight


def _shares(rule: AverageSpec, origin: int, applied: list[int]) -> list[float]:
    """Shares of the weights of before the first step and of each snapshot; the last is the newest."""
    shares = [1.0]
    for then, now in itertools.pairwise([origin, *applied]):
        weight = _weight(rule, then, now, origin)
        shares = [*(share * (1 - weight) for share in shares), weight]
    return shares


@given(st.data(), st.sampled_from(_ORIGINS), st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_sparse_stream_equals_a_dense_one_with_constant_weights(
    data: st.DataObject, origin: int, gaps: list[int]
) -> None:
    """Each snapshot has the share of all the steps that it stands for; and the shares sum to 1."""
    rule = data.draw(short_rules(origin))
    applied = [origin + moved for moved in itertools.accumulate(gaps)]
    total = applied[-1] - origin

    dense = dense_shares(rule, origin, total, _STEP_UNITS)[total]
    edges = [0, *(step - origin for step in applied)]
    expected = [dense[0], *(dense[then + 1 : now + 1].sum() for then, now in itertools.pairwise(edges))]
    found = _shares(rule, origin, applied)

    assert found == pytest.approx(expected, abs=1e-12)
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-14)


@given(st.data(), st.sampled_from(_ORIGINS), st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(0, 7))
def test_unit_step_decays_by_the_product_of_later_decays(
    data: st.DataObject, origin: int, gaps: list[int], place: int
) -> None:
    """Weights that are 0 until a snapshot and 1 from it on: the average is one minus what the dense stream keeps."""
    rule = data.draw(short_rules(origin))
    applied = [origin + moved for moved in itertools.accumulate(gaps)]
    turn = applied[min(place, len(applied) - 1)]
    before = max([origin, *(step for step in applied if step < turn)])
    average = 0.0
    for then, now in itertools.pairwise([origin, *applied]):
        average += _weight(rule, then, now, origin) * ((1.0 if now >= turn else 0.0) - average)

    total = applied[-1] - origin
    kept = dense_shares(rule, origin, total, _STEP_UNITS)[total][: before - origin + 1].sum()
    assert average == pytest.approx(1 - kept, abs=1e-12)


@given(st.data(), st.sampled_from(_ORIGINS), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_average_of_constant_weights_is_constant(data: st.DataObject, origin: int, gaps: list[int]) -> None:
    rule, average = data.draw(short_rules(origin)), 0.7
    for then, now in itertools.pairwise([origin, *(origin + moved for moved in itertools.accumulate(gaps))]):
        average += _weight(rule, then, now, origin) * (0.7 - average)

    assert average == 0.7


@pytest.mark.parametrize(
    ("decay", "delta", "kept"),
    [(0.9, 1, 0.9), (0.9, 2, 0.81), (0.9999, 10, 0.99900045), (0.9999, 100, 0.99004934), (0.5, 60, 0.0), (0.0, 1, 0.0)],
)
def test_known_weights_of_a_constant_decay(decay: float, delta: int, kept: float) -> None:
    for then in (1, 17):
        assert _weight(Ema(decay), then, then + delta) == pytest.approx(1 - kept, abs=5e-9)


@pytest.mark.parametrize(
    ("power", "step", "decay"),
    [
        (2 / 3, 2, 0.370039),
        (2 / 3, 3, 0.519250),
        (2 / 3, 10, 0.784557),
        (2 / 3, 100, 0.953584),
        (2 / 3, 1000, 0.990000),
        (2 / 3, 10_000, 0.997846),
        (2 / 3, 100_000, 0.999536),
        (3 / 4, 10, 0.822172),
        (3 / 4, 1000, 0.994377),
        (3 / 4, 10_000, 0.999000),
        (1.0, 4, 0.75),
    ],
)
def test_known_decays_of_timms_warmup(power: float, step: int, decay: float) -> None:
    """Tabulated from timm's formula; with power 1 it is the plain mean."""
    assert 1 - _weight(Ema(_ALL_BUT, warmup="timm", power=power), step - 1, step) == pytest.approx(decay, abs=5e-7)


@pytest.mark.parametrize(
    ("rule", "reached"),
    [
        (Ema(_ALL_BUT, warmup="timm"), (31_623, 353_554, 1_000_000)),
        (Ema(_ALL_BUT, warmup="timm", power=0.75), (10_000, 85_499, 215_444)),
        (Ema(_ALL_BUT, warmup="tf"), (8_990, 44_990, 89_990)),
    ],
    ids=["timm-2/3", "timm-3/4", "tf"],
)
def test_warmup_reaches_known_decays_at_known_steps(rule: Ema, reached: tuple[int, ...]) -> None:
    for step, rest in zip(reached, (1e-3, 2e-4, 1e-4), strict=True):
        bound = rest * (1 + 1e-9)
        assert _weight(rule, step - 1, step) <= bound < _weight(rule, step - 2, step - 1)


def _moments(rule: AverageSpec, steps: int, every: int = 1) -> tuple[float, float]:
    """Mean and standard deviation of the steps under an average's shares, relative to the run."""
    applied = np.arange(every, steps + 1, every)
    weights = np.array([_weight(rule, step - every, step) for step in applied.tolist()])
    kept = np.concatenate([np.cumprod((1 - weights)[::-1])[::-1][1:], [1.0]])
    places = (applied - (every - 1) / 2) / steps
    mean = float((weights * kept * places).sum())
    return mean, float(np.sqrt((weights * kept * (places - mean) ** 2).sum()))


@pytest.mark.parametrize(
    ("spec", "width", "digit"),
    [
        ("ema:half_life=inf,warmup=half_life", 0.0629, 5e-5),
        ("ema:half_life=inf,warmup=half_life,fraction=0.09", 0.1024, 5e-5),
        ("ema:0.99999999,warmup=tf", 0.0905, 5e-5),
        ("ema:0.99999999,warmup=timm,power=1", 1 / math.sqrt(12), 5e-5),
        ("ema:0.99999999,warmup=timm", 0.035, 5e-4),
        ("ema:0.99999999,warmup=timm,power=0.75", 0.074, 5e-4),
    ],
)
def test_warmups_have_the_known_widths_after_20_000_steps(spec: str, width: float, digit: float) -> None:
    """They are power-function averages in disguise: tf is gamma 8, a half-life ramp of f is 1 / (f ln 2) ... ."""
    assert _moments(parse_average(spec), 20_000)[1] == pytest.approx(width, abs=digit)


def test_power_average_has_a_power_profile() -> None:
    """Against `t ** gamma` at T = 1000, sigma_rel 0.05: the known largest difference, width and mean age."""
    rule = PowerEma(0.05)
    gamma, steps = rule.exponent, 1000
    shares = np.array(_shares(rule, 0, list(range(1, steps + 1)))[1:])
    profile = (np.arange(1, steps + 1) / steps) ** gamma
    profile /= profile.sum()

    mean, width = _moments(rule, steps)
    assert np.abs(shares - profile).max() / profile.max() == pytest.approx(4.9e-4, abs=5e-6)
    assert width == pytest.approx(0.0499993, abs=5e-8)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / steps)


@pytest.mark.parametrize("every", [1, 10, 100])
def test_power_average_keeps_its_width_at_any_cadence(every: int) -> None:
    assert _moments(PowerEma(0.05), 10_000, every)[1] == pytest.approx(0.05, abs=2e-4)


def test_torchvisions_adjusted_decay_is_a_decay_per_update() -> None:
    """1 - (1 - decay) * world * batch * ema_steps / epochs, applied once in ema_steps: its 32nd root at every step."""
    kept = 1 - min(1.0, (1 - 0.99998) * 8 * 128 * 32 / 600)

    assert 1 - _weight(Ema(kept ** (1 / 32)), 320, 352) == pytest.approx(kept, rel=1e-12)


@pytest.mark.parametrize("delta", [1, 7, 10**6])
def test_decay_just_below_1_loses_no_digits(delta: int) -> None:
    assert _weight(Ema(1 - 2.0**-52), 5, 5 + delta) == pytest.approx(delta * 2.0**-52, rel=1e-9)
    assert _weight(Ema(half_life=1e14), 5, 5 + delta) == pytest.approx(delta * math.log(2) / 1e14, rel=1e-9)


@pytest.mark.parametrize("decay", [0.25, 0.9, 1 - 2.0**-20, 1 - 2.0**-52])
def test_debiased_average_is_exact_from_its_first_steps(decay: float) -> None:
    """An average from zero has the shares (1 - d) d**i / (1 - d**n): computed in fractions."""
    exact = Fraction(decay)
    for then, now in [(1, 2), (1, 5), (2, 3), (7, 40)]:
        expected = (1 - exact ** (now - then)) / (1 - exact**now)
        assert _weight(Ema(decay, warmup="debias"), then, now) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "ema:0.9,warmup=tf",
        "ema:half_life=3.3,warmup=tf",
        "ema:0.9,warmup=half_life,fraction=0.1",
        "ema:0.9,warmup=timm,power=0.8",
        "ema:0.9,warmup=timm,min=0.5,update_after=7",
        "ema:0.9,warmup=exponential,tau=15",
    ],
)
@pytest.mark.parametrize(("then", "now"), [(10, 300), (60, 90), (70, 140), (150, 151)])
def test_gap_across_the_end_of_a_warmup_multiplies_its_decays(spec: str, then: int, now: int) -> None:
    rule = parse_average(spec)
    kept = dense_shares(rule, 0, now, _STEP_UNITS)[now][: then + 1].sum()

    assert _weight(rule, then, now) == pytest.approx(1 - kept, rel=1e-12)


@pytest.mark.parametrize("then", [1_000_000, 30_000_000])
@pytest.mark.parametrize(
    "rule",
    [
        Ema(0.999999999, warmup="timm", power=0.9),
        Ema(0.999999999, warmup="exponential", tau=1e8),
        Ema(0.999999999, warmup="tf"),
        Ema(half_life=math.inf, warmup="half_life"),
    ],
    ids=lambda rule: rule.warmup,
)
def test_gap_within_a_long_warmup_multiplies_its_decays_within_1e_8(rule: Ema, then: int) -> None:
    """The reference takes every step on its own, summed without rounding (`math.fsum`)."""
    delta = 100_000
    left = math.fsum(math.log1p(-_weight(rule, step - 1, step)) for step in range(then + 1, then + delta + 1))

    assert _weight(rule, then, then + delta) == pytest.approx(-math.expm1(left), rel=1e-8)


@pytest.mark.parametrize("warmup", [None, "timm", "tf", "exponential", "half_life", "debias"])
def test_weights_are_copied_until_one_step_after_update_after(warmup: str | None) -> None:
    rule = Ema(0.9999, warmup=warmup, update_after=3)  # type: ignore[arg-type]

    assert [weight_of(rule, Span(then, then + 1, 0)) is None for then in range(6)] == [True] * 4 + [False] * 2
    assert weight_of(rule, Span(3, 10**6, 0)) is None


def test_init_start_gives_the_first_step_a_weight() -> None:
    assert weight_of(Ema(0.75, init="start"), Span(9, 10, 9)) == 0.25
    assert weight_of(Ema(0.75, init="start", update_after=3), Span(12, 13, 9)) == 0.25
    assert weight_of(Ema(0.75, init="start", update_after=3), Span(11, 13, 9)) is None
    assert weight_of(Ema(0.75), Span(9, 10, 9)) is None


def test_swa_copies_until_its_start_and_counts_multiples_of_every() -> None:
    rule = Uniform(1000, 100)

    assert weight_of(rule, Span(900, 999, 0)) is None
    assert weight_of(rule, Span(990, 1000, 0)) is None, "the first of its steps is all there is"
    assert weight_of(rule, Span(1000, 1099, 0)) == 0.0, "none of its steps passed"
    assert weight_of(rule, Span(1099, 1101, 0)) == 1 / 2
    assert weight_of(rule, Span(1100, 1500, 0)) == 4 / 6


def test_wsd_copies_then_averages_then_stays_constant() -> None:
    rule = Wsd(1000, 10)

    assert weight_of(rule, Span(999, 1000, 0)) is None
    assert weight_of(rule, Span(1000, 1001, 0)) is None
    assert weight_of(rule, Span(1001, 1002, 0)) == 1 / 2
    assert weight_of(rule, Span(1005, 2000, 0)) == 5 / 10
    assert weight_of(rule, Span(1010, 1011, 0)) == 0.0


@given(st.integers(1, 60), st.sampled_from(["linear", "sqrt", "cosine"]), st.integers(0, 2**32 - 1))
def test_wsd_gives_the_weights_of_a_decaying_learning_rate(steps: int, shape: str, seed: int) -> None:
    """Each update of a random walk times the rate's factor at its step, against the average of the walk."""
    walk = np.cumsum(np.random.default_rng(seed).normal(size=steps + 2))
    factor: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }
    annealed, average = walk[1], walk[1]
    for place in range(1, steps + 1):
        annealed += factor[shape]((place - 1) / steps) * (walk[place + 1] - walk[place])
        weight = _weight(Wsd(100, steps, shape), 99 + place, 100 + place)  # type: ignore[arg-type]
        average += weight * (walk[place + 1] - average)

    assert average == pytest.approx(annealed, abs=1e-11)


@pytest.mark.parametrize(
    "rule",
    [
        Ema(0.9999),
        Ema(0.9999, warmup="timm"),
        Ema(0.9999, warmup="timm", power=0.01),
        Ema(0.9999, warmup="timm", gamma=1e-9),
        Ema(_ALL_BUT, warmup="timm", gamma=1e12),
        Ema(_ALL_BUT, warmup="tf"),
        Ema(0.9999, warmup="exponential", tau=9e14),
        Ema(0.9999, warmup="exponential", tau=1e-9),
        Ema(half_life=9e14, warmup="half_life"),
        Ema(0.0, warmup="half_life"),
        Ema(0.9, warmup="debias"),
        PowerEma(1e-6),
        PowerEma(gamma=0.0),
        Uniform(),
    ],
    ids=lambda rule: rule.spec,
)
def test_huge_gap_takes_the_new_weights_in_bounded_time(rule: AverageSpec) -> None:
    """Bounded in steps of arithmetic; the clock only tells a bounded loop from one over 2**52 steps."""
    started = time.monotonic()

    assert _weight(rule, 5, 2**52) == pytest.approx(1.0, abs=1e-6)
    assert time.monotonic() - started < 60


_UNITS = st.sampled_from([1e-9, 1.0, 9e14])


@given(
    any_rules().filter(lambda rule: not isinstance(rule, Bema | Window)),
    st.builds(StepUnits, _UNITS, _UNITS),
    st.sampled_from([0, 7, 2**40]),
    st.sampled_from([0, 1, 5, 10**4, 2**52]),
    st.sampled_from([1, 2, 1000]),
)
def test_every_valid_rule_has_a_weight_and_a_decay_at_every_step(
    rule: AverageSpec, units: StepUnits, origin: int, time: int, gap: int
) -> None:
    """A weight that is no number would fill the average with such, and an error stop the averages of all runs."""
    weight = weight_of(rule, Span(origin + time, origin + time + gap, origin), units)
    reach = reach_now(rule, origin + time + gap, origin, units)

    assert weight is None or 0.0 <= weight < 1.0
    assert reach is None or (0.0 <= reach.decay <= 1.0 and reach.half_life_steps >= 0.0)


def test_half_life_of_zero_is_a_decay_of_zero() -> None:
    rule = Ema(half_life_samples=9)
    object.__setattr__(rule, "half_life_samples", 5e-324)  # the bounds leave this to arithmetic: it must have an answer

    assert _weight(rule, 3, 4) == 1.0
    assert reach_now(rule, 4, 0, _STEP_UNITS) == Reach(0.0, 0.0)


def test_huge_gap_within_a_warmup_is_summed_in_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the thread that averages; while it sums, every run waits."""
    asked: list[object] = []
    curve = decays._timm

    def counted(rule: Ema, constant: float, n: float) -> object:
        asked.append(n)
        return curve(rule, constant, n)

    monkeypatch.setattr(decays, "_timm", counted)

    assert _weight(Ema(_ALL_BUT, warmup="timm", power=1.0), 5, 2**50) < 1.0
    assert len(asked) < 150_000


@pytest.mark.parametrize("then", [11_985, 11_996, 12_001, 59_970, 59_999, 70_000])
def test_no_step_of_a_gap_gets_the_decay_of_a_later_warmup_phase(then: int) -> None:
    """The decay is held at 0.5 up to step 12,001, and at 0.75 from step 60,001 on."""
    rule = Ema(0.75, warmup="timm", gamma=4000.0, power=0.5, min_decay=0.5)
    left = math.fsum(math.log1p(-_weight(rule, step - 1, step)) for step in range(then + 1, then + 61))

    found = decays.summed(lambda n: decays._timm(rule, math.log(0.75), n), then, then + 60)
    assert found == pytest.approx(left, rel=1e-12)


@given(st.integers(1, 50), st.integers(0, 300), st.integers(0, 300))
def test_points_are_the_multiples_in_between(every: int, then: int, now: int) -> None:
    assert points(every, then, now) == len([step for step in range(then + 1, now + 1) if step % every == 0])


def test_raw_always_takes_the_snapshot_and_a_window_has_no_weight() -> None:
    assert weight_of(Raw(), Span(3, 7, 0)) is None
    with pytest.raises(ValueError, match="is a window"):
        weight_of(Window(3), Span(3, 7, 0))


@pytest.mark.parametrize(
    ("spec", "needed"), [("ema:half_life_samples=9", "samples_per_step"), ("ema:half_life_epochs=9", "steps_per_epoch")]
)
def test_rule_with_unknown_step_units_has_no_weight(spec: str, needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        weight_of(parse_average(spec), Span(3, 7, 0))


@pytest.mark.parametrize(("last", "step", "origin"), [(5, 5, 0), (5, 2, 0), (5, 6, 7)])
def test_span_must_be_in_order(last: int, step: int, origin: int) -> None:
    with pytest.raises(ValueError, match=f"need origin <= last < step, got {origin}, {last}, {step}"):
        Span(last, step, origin)
