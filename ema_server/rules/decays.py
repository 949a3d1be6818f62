"""How much of an exponential moving average remains after a number of steps, in float64.

A rule's time `n` counts steps since the rule stopped copying. Products of decays are computed as sums of logarithms,
and decays near 1 are never subtracted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

from ema_proto.averages.rules import Ema
from ema_proto.averages.step_units import StepUnits, half_life_steps

_LN2 = math.log(2.0)
_NEGLIGIBLE = math.log(2.0**-60)  # a share so small that 1 minus it is 1 in float64
_BLOCK_BITS = 10
_SETTLED = 60.0  # exp(-60) is far below the last bit of 1
_SERIES_FROM = 32  # from here on the series of the harmonic numbers is exact in float64
_TF_OFFSET = 10  # (1 + n) / (10 + n)


class Phase(Enum):
    """A decay at one step: held at its lowest value, rising, or constant from here on."""

    WAITING = "waiting"
    RISING = "rising"
    SETTLED = "settled"


def log_decay(rule: Ema, units: StepUnits) -> float:
    """Natural logarithm of the rule's decay for one step, without its warm-up; -inf for decay 0, 0 for decay 1.

    Raises:
        ValueError: the rule needs step units that are not known.
    """
    if rule.decay is not None:
        return math.log(rule.decay) if rule.decay > 0 else -math.inf
    half_life = half_life_steps(rule, units)
    return -_LN2 / half_life if half_life > 0 else -math.inf


def weight_between(rule: Ema, then: int, now: int, units: StepUnits) -> float:
    """One minus the product of the decays of the steps `n` in (then, now]; in (0, 1]. Neither time is negative."""
    if rule.warmup is None and rule.decay is not None and now == then + 1:
        return 1.0 - rule.decay
    constant = log_decay(rule, units)
    if rule.warmup == "debias":
        return _debiased(constant, then, now)
    if rule.warmup == "tf":
        left = _tf(constant, then, now)
    elif rule.warmup == "half_life":
        left = _ramped(constant, rule.fraction, then, now)
    elif rule.warmup == "timm":
        left = summed(lambda n: _timm(rule, constant, n), then, now)
    elif rule.warmup == "exponential":
        left = summed(lambda n: _exponential(rule.tau, constant, n), then, now)
    else:
        left = _times(now - then, constant)
    return -math.expm1(left)


def summed(curve: Callable[[float], tuple[float, Phase]], then: int, now: int) -> float:
    """Sum of `curve`, a rising function that flattens, over the steps in (then, now].

    Steps are summed in blocks of 2**-10 of the time so far, within which no phase ends. A block is replaced by two
    points with its mean and variance, which is exact for cubics. The relative error is below 1e-9, and the longest gap
    takes some tens of thousands of points.
    """
    left, at = 0.0, then
    while at < now and left > _NEGLIGIBLE:
        one, phase = curve(at + 1)
        if phase is Phase.SETTLED:
            return left + (now - at) * one
        block = min(now - at, max(1, at >> _BLOCK_BITS))
        while block > 1 and curve(at + block)[1] is not phase:
            block //= 2
        middle, deviation = at + (block + 1) / 2, math.sqrt((block * block - 1) / 12)
        left += block * (curve(middle - deviation)[0] + curve(middle + deviation)[0]) / 2 if block > 1 else one
        at += block
    return left


def _debiased(constant: float, then: int, now: int) -> float:
    """The decays d (1 - d**(n-1)) / (1 - d**n) telescope: d**(now-then) (1 - d**then) / (1 - d**now) is left."""
    return math.expm1(constant * (now - then)) / math.expm1(constant * now)


def _tf(constant: float, then: int, now: int) -> float:
    """Logarithm of the product of min((1 + n) / (10 + n), d); the factors before d is reached telescope."""
    share = -math.expm1(constant)
    reached = now if share * (now + _TF_OFFSET) <= _TF_OFFSET - 1 else math.floor((_TF_OFFSET - 1) / share) - _TF_OFFSET
    turn = min(now, max(then, reached))
    rising = math.fsum(math.log1p((turn - then) / (then + j)) for j in range(2, _TF_OFFSET + 1))
    return _times(now - turn, constant) - rising


def _ramped(constant: float, fraction: float, then: int, now: int) -> float:
    """Logarithm of the product of 2**(-1 / min(half-life, fraction n)): harmonic numbers until the half-life."""
    reached = now if -constant * fraction * now <= _LN2 else math.floor(_LN2 / (-constant * fraction))
    turn = min(now, max(then, reached))
    return _times(now - turn, constant) - _LN2 / fraction * harmonic_between(then, turn)


def harmonic_between(then: int, now: int) -> float:
    """1/(then+1) + ... + 1/now, to float64's precision however long it is."""
    split = min(now, max(then, _SERIES_FROM))
    first = math.fsum(1 / n for n in range(then + 1, split + 1))
    if split == now:
        return first
    return math.fsum((first, math.log1p((now - split) / split), _harmonic_rest(now), -_harmonic_rest(split)))


def _harmonic_rest(n: int) -> float:
    """The harmonic number less log(n) and Euler's constant (Euler-Maclaurin)."""
    square = float(n) ** -2
    return 0.5 / n - square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))


def _timm(rule: Ema, constant: float, n: float) -> tuple[float, Phase]:
    """Logarithm of the decay of timm's `ModelEmaV3.get_decay` at its `s = n - 1`."""
    rest = math.exp(-rule.power * math.log1p((n - 1) / rule.gamma))
    least, most = -math.expm1(constant), 1.0 - rule.min_decay
    share = min(max(rest, least), most)
    phase = Phase.SETTLED if rest <= least else Phase.WAITING if rest >= most else Phase.RISING
    return (math.log1p(-share) if share < 1.0 else -math.inf), phase


def _exponential(tau: float, constant: float, n: float) -> tuple[float, Phase]:
    """Logarithm of d (1 - exp(-n / tau))."""
    phase = Phase.SETTLED if n > _SETTLED * tau else Phase.RISING
    return constant + math.log(-math.expm1(-n / tau)), phase


def _times(count: int, logarithm: float) -> float:
    return count * logarithm if count else 0.0
