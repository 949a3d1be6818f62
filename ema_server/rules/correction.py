"""A `bema`: the weight of a snapshot in its moving average, and the factor of the correction, in float64.

Its updates are numbered from 1: update j is at the time `update_after + j * every`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ema_proto.averages.rules import Bema
from ema_server.rules.decays import Phase, summed
from ema_server.rules.weights import Span, points


@dataclass(frozen=True, slots=True)
class Correction:
    """What a snapshot does to the average: `ema + factor * (weights - initial)`.

    Args:
        weight: of the snapshot in the moving average, in (0, 1].
        factor: of the distance from the initial weights, in (0, 1].
    """

    weight: float
    factor: float

    @property
    def mix(self) -> tuple[float, float]:
        """Weights of two blends, of the snapshot and then of the initial weights, into the old moving average.

        `ema + w * (weights - ema)` and `x + v * (initial - x)` give the average if v is minus the factor and
        (1 + factor) (1 - w) is the share that is left of the old moving average.
        """
        return (self.weight + self.factor) / (1.0 + self.factor), -self.factor


def begins(rule: Bema, span: Span) -> bool:
    """Whether the average begins again with this snapshot: it represents a step up to `update_after`."""
    return span.last < span.origin + rule.update_after


def correction_of(rule: Bema, span: Span) -> Correction | None:
    """What the snapshot does to the average; None if no update lies among the steps that it represents."""
    begun = span.origin + rule.update_after
    if not points(rule.every, span.last - begun, span.step - begun):
        return None
    first, last = (span.last - begun) // rule.every, (span.step - begun) // rule.every

    def kept(update: float) -> tuple[float, Phase]:
        share = max(_age(rule, update) ** -rule.ema_power, rule.min_weight)
        settled = share <= rule.min_weight or rule.ema_power == 0.0
        return math.log1p(-share) if share < 1.0 else -math.inf, Phase.SETTLED if settled else Phase.RISING

    return Correction(-math.expm1(summed(kept, first, last)), _factor(rule, last))


def factor_at(rule: Bema, step: int, origin: int) -> float:
    """The factor of the last update up to `step`; 0 before the first."""
    last = (step - origin - rule.update_after) // rule.every
    return _factor(rule, last) if last > 0 else 0.0


def _factor(rule: Bema, update: int) -> float:
    return float(_age(rule, update) ** -rule.bias_power)


def _age(rule: Bema, update: float) -> float:
    return rule.lag + rule.multiplier * (rule.update_after + update * rule.every)
