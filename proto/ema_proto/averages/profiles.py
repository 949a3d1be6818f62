"""The width of a power-function average: its relative standard deviation and its exponent.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), equations 123 and
126: weights in proportion to `t ** gamma` over `[0, T]` have the standard deviation `sigma_rel * T`.
"""

from __future__ import annotations

import math
from functools import lru_cache

SIGMA_REL_MAX = 1 / math.sqrt(12)  # of the plain mean, gamma 0; a wider profile would weigh early steps more
SIGMA_REL_MIN = 1e-6  # one step in a million: narrower is no average of any run
GAMMA_MAX = 1e6

_ITERATIONS_MAX = 100


def sigma_rel_of(gamma: float) -> float:
    """Relative standard deviation of the profile `t ** gamma`.

    Raises:
        ValueError: `gamma` is not in [0, 1e6].
    """
    if not 0 <= gamma <= GAMMA_MAX:
        raise ValueError(f"gamma {gamma!r} is not from 0 to {GAMMA_MAX:.0f}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


@lru_cache(maxsize=1024)
def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile with this relative standard deviation: the inverse of `sigma_rel_of`.

    It is the largest root of `x**3 + 7 x**2 + (16 - s) x + (12 - s)` with `s = sigma_rel ** -2`. Newton's steps from
    `1 / sigma_rel`, which is above it, fall to it: the polynomial is convex there.

    Raises:
        ValueError: `sigma_rel` is not in [1e-6, 1/sqrt(12)).
    """
    if not SIGMA_REL_MIN <= sigma_rel < SIGMA_REL_MAX:
        raise ValueError(f"sigma_rel {sigma_rel!r} is not at least {SIGMA_REL_MIN:f} and below {SIGMA_REL_MAX:.6f}")
    s = sigma_rel**-2
    root = 1 / sigma_rel
    for _ in range(_ITERATIONS_MAX):
        value = ((root + 7) * root + (16 - s)) * root + (12 - s)
        lower = root - value / ((3 * root + 14) * root + (16 - s))
        if not lower < root:
            break
        root = lower
    return max(root, 0.0)
