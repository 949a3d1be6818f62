"""The weight that each averaging rule gives to a snapshot, in float64.

A rule's time is the number of steps since the average's origin; its `start` and `every` count the trainer's steps. A
snapshot stands for all steps since the last one, as if they had had its weights: neither `every` nor gaps nor lost
snapshots change the meaning of a rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_proto.averages.rules import AverageSpec, Bema, Ema, PowerEma, Raw, Uniform, Window, Wsd
from ema_proto.averages.step_units import UNKNOWN, StepUnits, needed_of
from ema_server.rules.decays import weight_between


@dataclass(frozen=True, slots=True)
class Span:
    """The steps (last, step] that a snapshot stands for, in the trainer's count.

    Args:
        last: the last applied step, or the origin if there is none.
        step: the snapshot's step.
        origin: the number of steps already taken when the average began.

    Raises:
        ValueError: unless origin <= last < step.
    """

    last: int
    step: int
    origin: int

    def __post_init__(self) -> None:
        if not self.origin <= self.last < self.step:
            raise ValueError(f"need origin <= last < step, got {self.origin}, {self.last}, {self.step}")


def points(every: int, then: int, now: int) -> int:
    """How many multiples of `every` lie in (then, now]; 0 where `now` is not above `then`."""
    return max(0, now // every - then // every)


def weight_of(rule: AverageSpec, span: Span, units: StepUnits = UNKNOWN) -> float | None:
    """The share of the snapshot in the updated average: in [0, 1), or None if the snapshot replaces the average.

    The first snapshot replaces the average, unless the rule starts from the weights before the first step
    (`init=start`), which the average then already holds.

    Args:
        rule: any averaging rule except `Window` and `Bema`.
        span: the steps that the snapshot stands for.
        units: samples per step and steps per epoch, as given by the trainer.

    Raises:
        ValueError: the rule is a `Window` or a `Bema`, or needs step units that are unknown.
    """
    if isinstance(rule, Raw):
        return None
    if isinstance(rule, Ema):
        weight = _ema(rule, span, units)
    elif span.last <= span.origin:
        weight = None
    elif isinstance(rule, PowerEma):
        weight = _power(rule.exponent, span)
    elif isinstance(rule, Uniform):
        weight = _uniform(rule, span)
    elif isinstance(rule, Wsd):
        weight = _wsd(rule, span)
    else:
        raise ValueError(f"average {rule.name!r} is a {rule.KEYWORD}: it has several weights for each snapshot")
    return None if weight is None or weight >= 1.0 else weight


def is_copied(rule: AverageSpec, span: Span) -> bool:
    """Whether an `ema` begins with this snapshot: it copies up to `n` 0, and with `init=first` up to `n` 1."""
    if not isinstance(rule, Ema):
        return False
    begun = span.origin + rule.update_after
    return span.step <= begun or span.last < begun or (span.last == begun and rule.init == "first")


@dataclass(frozen=True, slots=True)
class Reach:
    """Decay per step, in [0, 1], and the half-life of that decay in steps: infinite for 1, 0 for 0."""

    decay: float
    half_life_steps: float


def reach_now(rule: AverageSpec, step: int, origin: int, units: StepUnits) -> Reach | None:
    """Decay and half-life of an average whose last applied step is `step`; None for `raw`, windows and `bema`.

    Raises:
        ValueError: the rule needs step units that are unknown.
    """
    if isinstance(rule, Raw | Window | Bema):
        return None
    if isinstance(rule, Uniform):
        held = points(rule.every, max(origin, rule.start - 1), step)
        return _reach(math.log1p(-1 / held) / rule.every if held > 1 else -math.inf)
    now = max(step, origin + 1)
    weight = weight_of(rule, Span(now - 1, now, origin), units)
    return _reach(-math.inf if weight is None else math.log1p(-weight))


def shown_reach(rule: AverageSpec, step: int, origin: int, units: StepUnits) -> tuple[float | None, float | None]:
    """Decay and half-life for display; None where there is none, where it is infinite, or where units are missing.

    It never raises: a figure for display must not stop the averaging.
    """
    needed = needed_of(rule)
    if needed is not None and getattr(units, needed) is None:
        return None, None
    try:
        reach = reach_now(rule, step, origin, units)
    except (ArithmeticError, ValueError):
        return None, None
    if reach is None:
        return None, None
    return reach.decay, None if math.isinf(reach.half_life_steps) else reach.half_life_steps


def _ema(rule: Ema, span: Span, units: StepUnits) -> float | None:
    begun = span.origin + rule.update_after
    return None if is_copied(rule, span) else weight_between(rule, span.last - begun, span.step - begun, units)


def _power(gamma: float, span: Span) -> float:
    """Karras et al., equation 127: `1 - (then / now) ** (gamma + 1)` in time, exact for any gap."""
    return -math.expm1((gamma + 1) * math.log1p(-(span.step - span.last) / (span.step - span.origin)))


def _uniform(rule: Uniform, span: Span) -> float | None:
    """`c / (N + c)`, for c new multiples of `every` and N earlier ones."""
    after = max(span.origin, rule.start - 1)
    before = points(rule.every, after, span.last)
    new = points(rule.every, max(after, span.last), span.step)
    return new / (before + new) if before else None


def _wsd(rule: Wsd, span: Span) -> float | None:
    """`(C(now) - C(then)) / C(now)`, with C(x) = 1 - m(x) and m the rate's factor: the weighted mean of F15 and F18."""
    end, begun = rule.start + rule.steps, max(rule.start, span.origin)
    if span.last >= end:
        return 0.0
    if span.last <= begun:
        return None
    then, now = span.last - rule.start, min(span.step, end) - rule.start
    return _fallen(rule, then, now) / _fallen(rule, begun - rule.start, now)


def _fallen(rule: Wsd, then: int, now: int) -> float:
    """How far the rate's factor falls from step `then` to `now` of its decay, without cancellation."""
    if rule.shape == "linear":
        return (now - then) / rule.steps
    if rule.shape == "sqrt":
        return (now - then) / ((math.sqrt(now) + math.sqrt(then)) * math.sqrt(rule.steps))
    quarter = math.pi / 2 / rule.steps
    return math.sin((now - then) * quarter) * math.sin((now + then) * quarter)


def _reach(logarithm: float) -> Reach:
    half_life = math.inf if logarithm == 0 else -math.log(2.0) / logarithm
    return Reach(math.exp(logarithm), half_life)
