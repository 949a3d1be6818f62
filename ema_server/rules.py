"""What each averaging rule asks of the kernel. Pure arithmetic in float64; no tensor, no clock.

Comes in: the rule (`ema_proto.specs`) and the run's time at the last update and now. Goes out: the weight of the new
snapshot. A run's time is its steps since it was first joined.
"""

from __future__ import annotations

import math

from ema_proto.specs import AverageSpec, Ema, Raw

_NEGLIGIBLE = math.log(2.0**-60)  # a share so small that 1 minus it is 1 in float64
_EXACT_BITS = 16


def weight_of(rule: AverageSpec, then: int, now: int) -> float | None:
    """Share of the new snapshot in the updated average, in float64; None where the snapshot replaces it.

    The steps between count as if they had had the new weights: `average = k * average + (1 - k) * new`, with `k` the
    product of the decays of the steps after `then` up to `now`, is what as many updates by the same weights give.

    Args:
        rule: the averaging rule.
        then: the run's time at the last update.
        now: the run's time, above `then`.

    Raises:
        ValueError: `now` is not above `then`.
    """
    if now <= then:
        raise ValueError(f"time {now} is not above {then}: an update follows an earlier step")
    if isinstance(rule, Raw):
        return None
    if rule.update_after and then <= rule.update_after:
        return None
    if rule.warmup is None:
        return float(1.0 - rule.decay ** (now - then))
    return _warm(rule, then - rule.update_after - 1, now - rule.update_after - 1)


def _warm(rule: Ema, then: int, now: int) -> float | None:
    """`weight_of` during timm's warm-up; `then` and `now` are timm's step after `max(0, step - update_after_step - 1)`.

    Each decay is a factor of its own up to step 2**17. Later ones change by less than a part in 2**16 over a block of
    2**-16 of the time so far, and a block counts as that many times its middle: the logarithm of the product is then
    within a part in 10**9, and no gap, however long, takes longer than a few seconds.
    """
    if then < 0:
        return None
    if now == then + 1:
        return 1.0 - _decay(rule, now)
    left, at = 0.0, then
    while at < now and left > _NEGLIGIBLE:
        block = now - at if _decay(rule, at + 1) == rule.decay else min(now - at, max(1, at >> _EXACT_BITS))
        decay = _decay(rule, at + (block + 1) / 2)
        if decay == 0.0:
            return None
        left += block * math.log(decay)
        at += block
    return -math.expm1(left)


def _decay(rule: Ema, step: float) -> float:
    """The decay of timm's `ModelEmaV3.get_decay`, after its `max`: 0 at step 0, which copies."""
    if step <= 0:
        return 0.0
    reached = 1.0 - float((1.0 + step / rule.gamma) ** -rule.power)
    return max(min(reached, rule.decay), rule.min_decay)
