"""How far back an average reaches, for people: its decay and half-life at a step. Pure; shown, never computed with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_proto.averages.rules import AverageSpec, Raw, Uniform, Window
from ema_proto.averages.step_units import StepUnits, needed_of
from ema_server.rules.weights import Span, points, weight_of


@dataclass(frozen=True, slots=True)
class Reach:
    """Decay per step, in [0, 1], and the half-life of that decay in steps: infinite for 1, 0 for 0."""

    decay: float
    half_life_steps: float


def reach_now(rule: AverageSpec, step: int, origin: int, units: StepUnits) -> Reach | None:
    """The reach of an average at `step`; None for `raw` and windows, which have no decay.

    Args:
        rule: its rule.
        step: the last applied step.
        origin: the steps already taken when the average began.
        units: samples per step and steps per epoch, as the trainer gave them.

    Raises:
        ValueError: the rule needs step units that are not known.
    """
    if isinstance(rule, Raw | Window):
        return None
    if isinstance(rule, Uniform):
        held = points(rule.every, max(origin, rule.start - 1), step)
        return _reach(math.log1p(-1 / held) / rule.every if held > 1 else -math.inf)
    now = max(step, origin + 1)
    weight = weight_of(rule, Span(now - 1, now, origin), units)
    return _reach(-math.inf if weight is None else math.log1p(-weight))


def shown_reach(rule: AverageSpec, step: int, origin: int, units: StepUnits) -> tuple[float | None, float | None]:
    """Decay and half-life as they are shown wherever a rule is; None is what there is none of, or no end to.

    It never raises: a figure for people that cannot be told must not stop the averaging.
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


def _reach(logarithm: float) -> Reach:
    half_life = math.inf if logarithm == 0 else -math.log(2.0) / logarithm
    return Reach(math.exp(logarithm), half_life)
