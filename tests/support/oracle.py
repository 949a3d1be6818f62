"""Averages computed the slow, obvious way in float64, from weights and a ledger's JSON alone: no code of the server.

`bound` says how far a float32 average may be from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

EPS32 = 2.0**-24  # unit roundoff of float32: half the distance from 1 to the next number

Weights = Callable[[int], Mapping[str, Tensor]]


def ledger_steps(ledger: Mapping[str, Any]) -> list[int]:
    """The steps that a ledger's JSON lists, in order."""
    return [step for first, last, stride in ledger["ranges"] for step in range(first, last + 1, stride)]


def replay(ledger: Mapping[str, Any], decay: float, weights: Weights) -> dict[str, Tensor]:
    """The exponential moving average at the last step of `ledger`, every float in float64, everything else copied."""
    average: dict[str, Tensor] = {}
    previous = None
    for step in ledger_steps(ledger):
        new = {name: value.double() if value.is_floating_point() else value for name, value in weights(step).items()}
        if step in ledger["set"] or previous is None:
            average = {name: value.clone() for name, value in new.items()}
        else:
            kept = decay ** (step - previous)
            average = {
                name: average[name] * kept + value * (1.0 - kept) if value.is_floating_point() else value.clone()
                for name, value in new.items()
            }
        previous = step
    return average


def bound(ledger: Mapping[str, Any], decay: float, largest: float) -> float:
    """Largest error of a float32 average of weights no larger than `largest` in absolute value.

    One update `a + w * (p - a)` in float32 rounds w, the difference (2M eps each), the product (2M eps) and the sum
    (M eps): below 7 M eps together, w being at most 1. Earlier errors shrink by the decay at each update, so the total
    is at most 7 M eps * sum(d ** k) over the updates since the last replacement.
    """
    steps = ledger_steps(ledger)
    updates = len(steps) - steps.index(ledger["set"][-1])
    terms = (1 - decay**updates) / (1 - decay) if decay < 1 else updates
    return 7 * largest * EPS32 * max(terms, 1.0)


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest absolute difference between tensors of the same names; infinite if an integer differs."""
    assert set(one) == set(other)
    worst = 0.0
    for name, value in one.items():
        if not value.numel():
            continue
        if value.is_floating_point():
            worst = max(worst, (value.double() - other[name].double()).abs().max().item())
        elif not torch.equal(value, other[name]):
            return math.inf
    return worst
