"""Averages of libraries that are not run, by their published formulas: the weights of all steps, in float64.

They share no code with the server. Each function returns what `Peer.begin` returns, with weights in place of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from support.library_peers import Begin, State, Update
from support.parity_model import STEPS


def decays(decay: Callable[[int], float], *, copies_first: bool = False) -> Begin:
    """`average = d(n) * average + (1 - d(n)) * new` at the n-th step, from the initial weights.

    Args:
        decay: d.
        copies_first: the first step's decay is 0 instead.
    """
    weights = torch.zeros(STEPS + 2, dtype=torch.float64)
    weights[0] = 1.0
    for n in range(1, STEPS + 1):
        kept = 0.0 if copies_first and n == 1 else decay(n)
        weights *= kept
        weights[n] = 1 - kept
    return _given(weights)


def zero_debiased(decay: float) -> Begin:
    """Optax's `ema(debias=True)`, TensorFlow's `zero_debias`: zeros at first, divided by `1 - decay**n` when read."""
    weights = torch.zeros(STEPS + 2, dtype=torch.float64)
    for n in range(1, STEPS + 1):
        weights *= decay
        weights[n] = 1 - decay
    return _given(weights / (1 - decay**STEPS))


def mean_of(steps: Iterable[int]) -> Begin:
    """The plain mean of these steps."""
    weights = torch.zeros(STEPS + 2, dtype=torch.float64)
    weights[list(steps)] = 1.0
    return _given(weights / weights.sum())


def merged(start: int, steps: int, factor: Callable[[float], float]) -> Begin:
    """A learning rate that falls after `start`, imitated by a mean (WSM, arXiv 2507.17634).

    The update of the j-th step after `start` counts as if its rate had been `factor` of the rate at the end of
    the step before: theta_0 + sum of f_j (theta_j - theta_(j-1)) is a mean with the shares f_j - f_(j+1).
    """
    weights = torch.zeros(STEPS + 2, dtype=torch.float64)
    for j in range(1, steps + 1):
        weights[start + j] = factor((j - 1) / steps) - factor(j / steps)
    return _given(weights)


def half_life_ramp(half_life: float, fraction: float) -> Callable[[int], float]:
    """EDM's and EDM2's `TraditionalEMA`: the half-life is at most a fraction of the training so far."""
    return lambda n: float(0.5 ** (1 / min(half_life, fraction * n)))


def power_function(sigma_rel: float) -> Callable[[int], float]:
    """EDM2's `PowerFunctionEMA`: `(1 - 1/n) ** (gamma + 1)`, gamma by bisection of equation 126 of arXiv 2312.02696."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        too_wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > sigma_rel**2
        low, high = (middle, high) if too_wide else (low, middle)
    return lambda n: float((1 - 1 / n) ** (low + 1))


def cosine(share: float) -> float:
    """A cosine's factor of the learning rate."""
    return (1 + math.cos(math.pi * share)) / 2


def _given(weights: Tensor) -> Begin:
    state: Mapping[str, Tensor] = {"profile": weights}

    def begin(_: nn.Module) -> tuple[Update, State]:
        return lambda _: None, lambda: state

    return begin
