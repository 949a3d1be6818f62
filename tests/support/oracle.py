"""Reference averages in float64, computed from weights and a ledger's JSON. Shares no code with the server.

`bound` is the largest error that a float32 average may have.
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
    """The exponential moving average at the last step of `ledger`, every float in float64, everything else copied.

    The first update copies the weights, also where a set at the origin came before it.
    """
    average: dict[str, Tensor] = {}
    previous = None
    for step in ledger_steps(ledger):
        new = {name: value.double() if value.is_floating_point() else value for name, value in weights(step).items()}
        if previous is None or step in ledger["set"] or previous == ledger["origin"]:
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
    """Largest error that float32 may make in an average of float32 weights no larger than `largest` (M).

    With weight w = 1 - decay ** delta, one update `a + w * (p - a)` rounds the sum (M eps), and w, the difference and
    the product (2 M w eps each); where w is at least 0.5 torch computes `p - (p - a) * (1 - w)` instead, which is no
    worse than M eps (1 + 2 w + 6 (1 - w)). Both stay below M eps (1 + 8 w). Earlier errors shrink by decay ** delta.
    """
    error, previous = 0.0, None
    for step in ledger_steps(ledger):
        if previous is None or step in ledger["set"] or previous == ledger["origin"]:
            error = 0.0
        else:
            kept = decay ** (step - previous)
            error = error * kept + largest * EPS32 * (1 + 8 * (1 - kept))
        previous = step
    return error * 1.001 + largest * EPS32  # products of the small terms above; float64 published as float32


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
