"""What each averaging rule asks of the kernel. Pure arithmetic in float64; no tensor, no clock.

A rule (`ema_proto.averages.rules`), the span of steps that a snapshot stands for, and the trainer's step units give the
weight of the snapshot. A rule's time is the steps since the average's origin; its `start` and `every` count
the trainer's steps.

A snapshot stands for all steps since the last one, as if they had had its weights. So `every`, gaps and lost snapshots
change nothing of what a rule means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_proto.averages.exponential import Ema
from ema_proto.averages.rules import AverageSpec, PowerEma, Raw, Uniform, Wsd
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_server.rules.decays import weight_between


@dataclass(frozen=True, slots=True)
class Span:
    """The steps (then, now] that a snapshot stands for, in the trainer's count.

    Args:
        then: the last applied step, or the origin where there is none.
        now: the snapshot's step.
        origin: the steps already taken when the average began.

    Raises:
        ValueError: they are not in the order origin, then, now, or `now` is not above `then`.
    """

    then: int
    now: int
    origin: int

    def __post_init__(self) -> None:
        """Validate."""
        if not self.origin <= self.then < self.now:
            raise ValueError(f"step {self.now} is not above step {self.then}, or that is below origin {self.origin}")


def points(every: int, then: int, now: int) -> int:
    """How many multiples of `every` lie in (then, now]; 0 where `now` is not above `then`."""
    return max(0, now // every - then // every)


def weight_of(rule: AverageSpec, span: Span, units: StepUnits = UNKNOWN) -> float | None:
    """Share of the snapshot in the updated average, in (0, 1), or 0 where it is left as it is.

    None where the snapshot replaces it: always with the first snapshot, unless the rule begins from the weights of
    before the first step (`init=start`), which are then held already.

    Args:
        rule: the averaging rule, of any kind but `Window`, whose mean is no function of the average before.
        span: the steps that the snapshot stands for.
        units: samples per step and steps per epoch, as the trainer gave them.

    Raises:
        ValueError: the rule is a `Window`, or needs step units that are not known.
    """
    if isinstance(rule, Raw):
        return None
    if isinstance(rule, Ema):
        weight = _ema(rule, span, units)
    elif span.then <= span.origin:
        weight = None
    elif isinstance(rule, PowerEma):
        weight = _power(rule.exponent, span)
    elif isinstance(rule, Uniform):
        weight = _uniform(rule, span)
    elif isinstance(rule, Wsd):
        weight = _wsd(rule, span)
    else:
        raise ValueError(f"average {rule.name!r} is a window: its weights are those of its snapshots")
    return None if weight is None or weight >= 1.0 else weight


def _ema(rule: Ema, span: Span, units: StepUnits) -> float | None:
    """Averaging begins from the copy at `n` 0, or with `init=first` at `n` 1."""
    begun = span.origin + rule.update_after
    then, now = span.then - begun, span.now - begun
    if now <= 0 or then < 0 or (then == 0 and rule.init == "first"):
        return None
    return weight_between(rule, then, now, units)


def _power(gamma: float, span: Span) -> float:
    """Karras et al., equation 127: `1 - (then / now) ** (gamma + 1)` in time, exact for any gap."""
    return -math.expm1((gamma + 1) * math.log1p(-(span.now - span.then) / (span.now - span.origin)))


def _uniform(rule: Uniform, span: Span) -> float | None:
    """`c / (N + c)`: c points of the cadence are new, N were there."""
    after = max(span.origin, rule.start - 1)
    before = points(rule.every, after, span.then)
    new = points(rule.every, max(after, span.then), span.now)
    return new / (before + new) if before else None


def _wsd(rule: Wsd, span: Span) -> float | None:
    """`(C(now) - C(then)) / C(now)`, with C(x) = 1 - m(x) and m the rate's factor: the weighted mean of F15 and F18."""
    end, begun = rule.start + rule.steps, max(rule.start, span.origin)
    if span.then >= end:
        return 0.0
    if span.then <= begun:
        return None
    then, now = span.then - rule.start, min(span.now, end) - rule.start
    return _fallen(rule, then, now) / _fallen(rule, begun - rule.start, now)


def _fallen(rule: Wsd, then: int, now: int) -> float:
    """How far the rate's factor falls from step `then` to `now` of its decay, without cancellation."""
    if rule.shape == "linear":
        return (now - then) / rule.steps
    if rule.shape == "sqrt":
        return (now - then) / ((math.sqrt(now) + math.sqrt(then)) * math.sqrt(rule.steps))
    quarter = math.pi / 2 / rule.steps
    return math.sin((now - then) * quarter) * math.sin((now + then) * quarter)
