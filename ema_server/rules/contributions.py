"""The share of each step's weights in an average, computed from its rule and its ledger alone.

The newest step comes first: the oldest may be a million steps back and weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise

from ema_proto.averages.rules import AverageSpec, Bema, Window
from ema_proto.averages.step_units import StepUnits
from ema_server.rules.correction import begins, correction_of
from ema_server.rules.ledger import Ledger
from ema_server.rules.weights import Span, points, weight_of

_NEGLIGIBLE = 2.0**-64  # total share of the older steps below which they are left out


def shares_of(rule: AverageSpec, ledger: Ledger, units_at: Callable[[int], StepUnits]) -> Iterator[tuple[int, float]]:
    """Steps with their shares in an average, newest first, without those whose share is 0.

    The shares add up to 1, within 2**-64 and the rounding of float64. Those of a `bema` may be negative. The average is
    the sum of the weights after these steps, each times its share. `units_at` gives the step units that held at a step.

    Raises:
        ValueError: the rule needs step units that are unknown.
    """
    if isinstance(rule, Window):
        return _window(rule, ledger)
    if isinstance(rule, Bema):
        return _corrected(rule, ledger)
    return _blended(rule, ledger, units_at)


def _blended(rule: AverageSpec, ledger: Ledger, units_at: Callable[[int], StepUnits]) -> Iterator[tuple[int, float]]:
    left = 1.0
    for now, then in _newest_first(ledger):
        weight = None if then is None else weight_of(rule, Span(then, now, ledger.origin), units_at(now))
        share = left if weight is None else left * weight
        if share:
            yield now, share
        left = 0.0 if weight is None else left * (1.0 - weight)
        if left < _NEGLIGIBLE:
            return


def _window(rule: Window, ledger: Ledger) -> Iterator[tuple[int, float]]:
    inside: list[tuple[int, int]] = []
    free = rule.k
    for now, then in _newest_first(ledger):
        due = min(free, points(rule.every, ledger.origin if then is None else then, now))
        inside += [(now, due)] if due else []
        free -= due
        if not free:
            break
    if not inside and ledger.last_step is not None:
        inside.append((ledger.last_step, 1))  # not one multiple of `every` yet: the window follows the weights
    total = sum(count for _, count in inside)
    yield from ((step, count / total) for step, count in inside)


def _corrected(rule: Bema, ledger: Ledger) -> Iterator[tuple[int, float]]:
    """The shares of the moving average; the newest update gains the factor, and the initial weights lose it."""
    left, factor = 1.0, None
    for now, then in _newest_first(ledger):
        span = None if then is None else Span(then, now, ledger.origin)
        if span is None or begins(rule, span):
            yield now, left - (factor or 0.0)
            return
        correction = correction_of(rule, span)
        if correction is None:
            continue
        share = left * correction.weight + (correction.factor if factor is None else 0.0)
        factor = correction.factor if factor is None else factor
        left *= 1.0 - correction.weight
        if share:
            yield now, share


def _newest_first(ledger: Ledger) -> Iterator[tuple[int, int | None]]:
    """Each step and the step before it, back to the newest step that replaced the average, which has None."""
    begins = ledger.set_steps[-1] if ledger.set_steps else None
    for now, then in pairwise(chain(ledger.newest_first(), (-1,))):
        yield now, None if now == begins or then < 0 else then
        if now == begins:
            return
