"""How averages take in the elements of a block: the interface, and torch's way. `compiled` has a faster one.

Comes in: elements as they were sent, averages with a weight each. Goes out: the averages, updated. Not known here:
runs, rules, threads, and where in a snapshot the elements lay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

Weighted: TypeAlias = tuple[torch.Tensor, float]
"""What an average holds (1-D, contiguous, float32 or float64), and the weight that the new elements get in it."""


class Elements:
    """Elements of a snapshot (1-D, contiguous) as they were sent, and in the dtypes that averages are held in.

    Args:
        source: the elements in the wire's dtype.
        scratch: memory for conversions, by dtype; what was there is overwritten.
    """

    __slots__ = ("_found", "_scratch", "source")

    def __init__(self, source: torch.Tensor, scratch: Mapping[torch.dtype, torch.Tensor]) -> None:
        self.source = source
        self._scratch = scratch
        self._found = {source.dtype: source}

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The elements in `dtype`, converted at its first use."""
        if dtype not in self._found:
            self._found[dtype] = self._scratch[dtype].narrow(0, 0, len(self.source)).copy_(self.source)
        return self._found[dtype]


class Arithmetic(Protocol):
    """One way to compute. Several threads may share it."""

    @property
    def name(self) -> str:
        """As in the settings."""

    def lerp(self, elements: Elements, averages: Sequence[Weighted]) -> None:
        """`average += weight * (elements - average)` for each, in its own dtype.

        This form stays unbiased in float32, where `decay * average + (1 - decay) * elements` drifts, because its two
        rounded factors do not add up to 1.
        """


class ByTorch:
    """Torch's own interpolation: each average by itself, from elements of its own dtype."""

    name = "torch"

    def lerp(self, elements: Elements, averages: Sequence[Weighted]) -> None:
        """See `Arithmetic.lerp`."""
        for average, weight in averages:
            average.lerp_(elements.to(average.dtype), weight)


BY_TORCH = ByTorch()
