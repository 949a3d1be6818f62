"""Reference for every rule: a dense stream, one share for each step's weights. Shares no code with the server.

The formulas are written in other forms than the server's: decays one by one, a debiased average as one that began at
zero, means as lists of steps. `shares[0]` belongs to the initial weights, `shares[i]` to those after step i.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ema_proto.averages.rules import AverageSpec, Bema, Ema, PowerEma, Uniform, Window, Wsd
from ema_proto.averages.step_units import StepUnits

Shares = npt.NDArray[np.float64]


def dense_shares(rule: AverageSpec, origin: int, steps: int, units: StepUnits) -> list[Shares]:
    """The shares after 0, 1, ... `steps` steps."""
    if isinstance(rule, Ema):
        return _exponential(rule, steps, units)
    if isinstance(rule, PowerEma):
        return _power(rule, steps)
    if isinstance(rule, Bema):
        return _corrected(rule, steps)
    return [_mean(rule, origin, time, steps) for time in range(steps + 1)]


def _only(index: int, steps: int) -> Shares:
    shares = np.zeros(steps + 1)
    shares[index] = 1.0
    return shares


def _exponential(rule: Ema, steps: int, units: StepUnits) -> list[Shares]:
    constant = _constant(rule, units)
    shares = _only(0, steps)
    history, from_zero = [shares], np.zeros(steps + 1)
    for time in range(1, steps + 1):
        n = time - rule.update_after
        if n < 1 or (n == 1 and rule.init == "first"):
            shares = _only(time, steps)
            from_zero = (1 - constant) * shares
        elif rule.warmup == "debias":
            from_zero = constant * from_zero + (1 - constant) * _only(time, steps)
            shares = from_zero / from_zero.sum()
        else:
            decay = _decay(rule, constant, n, units)
            shares = decay * shares + (1 - decay) * _only(time, steps)
        history.append(shares)
    return history


def _constant(rule: Ema, units: StepUnits) -> float:
    if rule.decay is not None:
        return rule.decay
    return float(2 ** (-1 / _half_life(rule, units)))


def _half_life(rule: Ema, units: StepUnits) -> float:
    if rule.half_life is not None:
        return rule.half_life
    if rule.half_life_samples is not None:
        assert units.samples_per_step is not None
        return rule.half_life_samples / units.samples_per_step
    if rule.half_life_epochs is not None:
        assert units.steps_per_epoch is not None
        return rule.half_life_epochs * units.steps_per_epoch
    assert rule.decay is not None
    return math.log(0.5) / math.log(rule.decay) if rule.decay else 0.0


def _decay(rule: Ema, constant: float, n: int, units: StepUnits) -> float:
    if rule.warmup == "timm":
        return max(min(1 - float((1 + (n - 1) / rule.gamma) ** -rule.power), constant), rule.min_decay)
    if rule.warmup == "tf":
        return min((1 + n) / (10 + n), constant)
    if rule.warmup == "exponential":
        return constant * (1 - math.exp(-n / rule.tau))
    if rule.warmup == "half_life":
        half_life = min(_half_life(rule, units), rule.fraction * n)
        return float(2 ** (-1 / half_life)) if half_life else 0.0
    return constant


def _power(rule: PowerEma, steps: int) -> list[Shares]:
    history = [_only(0, steps)]
    for time in range(1, steps + 1):
        kept = (1 - 1 / time) ** (rule.exponent + 1)
        history.append(kept * history[-1] + (1 - kept) * _only(time, steps))
    return history


def _corrected(rule: Bema, steps: int) -> list[Shares]:
    history = [_only(0, steps)]
    moving = initial = history[0]
    for time in range(1, steps + 1):
        newest, age = _only(time, steps), rule.lag + rule.multiplier * time
        shares = history[-1]
        if time <= rule.update_after:
            shares = moving = initial = newest
        elif (time - rule.update_after) % rule.every == 0:
            share = max(age**-rule.ema_power, rule.min_weight)
            moving = (1 - share) * moving + share * newest
            shares = moving + age**-rule.bias_power * (newest - initial)
        history.append(shares)
    return history


def _mean(rule: AverageSpec, origin: int, time: int, steps: int) -> Shares:
    """A weighted mean of the weights at some steps, or the newest weights if there is no average yet."""
    weighed: dict[int, float] = {}
    for step in range(origin + 1, origin + time + 1):
        share = _counts(rule, step)
        if share:
            weighed[step - origin] = share
    if isinstance(rule, Window):
        weighed = dict.fromkeys(sorted(weighed)[-rule.k :], 1.0)
    if isinstance(rule, Wsd) and origin >= rule.start + rule.steps:
        weighed = {1: 1.0} if time else {}
    if not weighed:
        return _only(time, steps)
    shares = np.zeros(steps + 1)
    for index, share in weighed.items():
        shares[index] = share / math.fsum(weighed.values())
    return shares


def _counts(rule: AverageSpec, step: int) -> float:
    if isinstance(rule, Uniform):
        return float(step >= rule.start and step % rule.every == 0)
    if isinstance(rule, Window):
        return float(step % rule.every == 0)
    if isinstance(rule, Wsd):
        place = step - rule.start
        return _rate(rule, place - 1) - _rate(rule, place) if 0 < place <= rule.steps else 0.0
    return 0.0


def _rate(rule: Wsd, place: int) -> float:
    """The learning rate's factor after `place` steps of its decay."""
    x = place / rule.steps
    if rule.shape == "linear":
        return 1 - x
    return 1 - math.sqrt(x) if rule.shape == "sqrt" else (1 + math.cos(math.pi * x)) / 2
