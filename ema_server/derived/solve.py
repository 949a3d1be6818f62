"""Which shares of stored power averages add up to another one: least squares in float64.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), algorithm
3. Profiles are densities over time. The shares are scaled to sum to 1, or the weights would shrink.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_CELLS = 8192  # equal cells of time in which profiles are compared
_FOLDING_CELLS = 64  # for narrower profiles: cells for each e-fold growth
_FOLDINGS = 20  # e-foldings before its end; the square of the rest is below the resolution of float64
_RCOND = 1e-13  # below it are profiles that float64 cannot distinguish, such as one given twice
_NEGLIGIBLE = 1e-10  # parts of the sum, relative to the largest, that are left out


@dataclass(frozen=True, slots=True)
class Profile:
    """The average at `time` whose weights are proportional to `t ** gamma` for t in (0, time].

    Args:
        time: steps since the average began, above 0.
        gamma: its exponent, 0 or more.
    """

    time: float
    gamma: float


@dataclass(frozen=True, slots=True)
class Solution:
    """How to add up stored averages.

    Args:
        shares: of each stored average, in the given order; their sum is 1, and 0 means that it is not needed.
        error: relative L2 distance between the resulting and the wanted profile.
        amplification: sum of the absolute values of the shares, by which the rounding of stored weights is amplified.
    """

    shares: tuple[float, ...]
    error: float
    amplification: float


def solve(stored: Sequence[Profile], wanted: Profile) -> Solution:
    """The shares whose sum of stored profiles is closest to the wanted one in L2.

    Args:
        stored: at least one; none later than `wanted`.
        wanted: the target.

    Raises:
        ValueError: nothing is stored, a stored profile is later than `wanted`, or a time is not above 0.
    """
    if not stored or any(not 0 < profile.time <= wanted.time for profile in stored):
        raise ValueError(f"need stored profiles at times in (0, {wanted.time}], got {stored}")
    if wanted in stored:
        only = stored.index(wanted)
        return Solution(tuple(float(number == only) for number in range(len(stored))), 0.0, 1.0)
    times, gammas = _columns(stored)
    # Scaled to norm 1, since early profiles are high and narrow, late ones low and wide.
    norms = _products(times, gammas, times, gammas).sqrt()
    matrix = _products(times[:, None], gammas[:, None], times, gammas) / (norms[:, None] * norms)
    target = _products(times, gammas, *_columns([wanted])) / norms
    parts = torch.linalg.lstsq(matrix, target[:, None], rcond=_RCOND, driver="gelsd").solution[:, 0]
    parts[parts.abs() < _NEGLIGIBLE * parts.abs().max()] = 0.0
    found = parts / norms
    shares = tuple((found / found.sum()).tolist())
    return Solution(shares, _distance(stored, shares, wanted), math.fsum(map(abs, shares)))


def _columns(profiles: Sequence[Profile]) -> tuple[torch.Tensor, torch.Tensor]:
    times, gammas = ([profile.time for profile in profiles], [profile.gamma for profile in profiles])
    return torch.tensor(times, dtype=torch.float64), torch.tensor(gammas, dtype=torch.float64)


def _products(time_a: torch.Tensor, gamma_a: torch.Tensor, time_b: torch.Tensor, gamma_b: torch.Tensor) -> torch.Tensor:
    """Inner products over time of densities `(gamma + 1) / time * (t / time) ** gamma`: a closed form."""
    exponent = torch.where(time_a < time_b, gamma_b, -gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * torch.maximum(time_a, time_b))
    return scale * (time_a / time_b) ** exponent


def _distance(stored: Sequence[Profile], shares: Sequence[float], wanted: Profile) -> float:
    """Relative L2 distance of the sum from the wanted profile, from their exact weights in many cells of time.

    From the closed forms it would be a difference of numbers so close that seven digits are lost.
    """
    used = [(profile, share) for profile, share in zip(stored, shares, strict=True) if share]
    edges = _edges([profile for profile, _ in used], wanted)
    widths = edges.diff()
    target = _shares_up_to(edges, wanted).diff() / widths
    total = torch.zeros_like(edges)
    for profile, share in used:
        total += share * _shares_up_to(edges, profile)
    difference = total.diff() / widths - target
    return float(((difference**2 * widths).sum() / (target**2 * widths).sum()).sqrt())


def _edges(stored: Sequence[Profile], wanted: Profile) -> torch.Tensor:
    """Equal cells, and for profiles that are too narrow for them, cells in proportion to their width."""
    equal = torch.linspace(0.0, wanted.time, _CELLS + 1, dtype=torch.float64)
    times, gammas = _columns([*stored, wanted])
    is_narrow = times / (gammas + 1) < _FOLDING_CELLS * wanted.time / _CELLS
    depths = torch.arange(_FOLDING_CELLS * _FOLDINGS, dtype=torch.float64) / _FOLDING_CELLS
    narrow = times[is_narrow, None] * torch.exp(-depths / (gammas[is_narrow, None] + 1))
    edges: torch.Tensor = torch.cat([equal, times, narrow.flatten()]).unique()
    return edges


def _shares_up_to(edges: torch.Tensor, profile: Profile) -> torch.Tensor:
    return (edges / profile.time).clamp(max=1.0) ** (profile.gamma + 1)
