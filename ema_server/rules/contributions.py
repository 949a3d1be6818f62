"""How much of each step's weights is in an average: from its rule and its ledger alone, so that anyone can rebuild it.

Pure; the newest step first, since the oldest may be a million steps back and weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise

from ema_proto.averages.rules import AverageSpec, Window
from ema_proto.averages.step_units import StepUnits
from ema_server.rules.ledger import Ledger
from ema_server.rules.weights import Span, points, weight_of

_NEGLIGIBLE = 2.0**-64  # what all older steps weigh together then is nothing in float64


def shares_of(rule: AverageSpec, ledger: Ledger, units_at: Callable[[int], StepUnits]) -> Iterator[tuple[int, float]]:
    """Each step inside an average with its share in it, newest first; steps that have none are left out.

    The shares add up to 1, within 2**-64 and float64's rounding. The average is the sum, in float64, of the weights of
    these steps, each times its share.

    Args:
        rule: the average's rule.
        ledger: its steps.
        units_at: what the trainer had told of its steps when it took one.

    Raises:
        ValueError: the rule needs step units that are not known.
    """
    if isinstance(rule, Window):
        return _window(rule, ledger)
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
    room = rule.k or 0
    for now, then in _newest_first(ledger):
        due = min(room, points(rule.every, ledger.origin if then is None else then, now))
        inside += [(now, due)] if due else []
        room -= due
        if not room:
            break
    if not inside and ledger.last_step is not None:
        inside.append((ledger.last_step, 1))  # no point of its cadence yet: it follows the weights
    total = sum(count for _, count in inside)
    yield from ((step, count / total) for step, count in inside)


def _newest_first(ledger: Ledger) -> Iterator[tuple[int, int | None]]:
    """Each step and the one before it, back to the newest at which the weights replaced the average, which has None."""
    begins = ledger.set_steps[-1] if ledger.set_steps else None
    for now, then in pairwise(chain(ledger.newest_first(), (-1,))):
        yield now, None if now == begins or then < 0 else then
        if now == begins:
            return
