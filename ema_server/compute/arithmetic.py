"""How averages take in the elements of a block: the interface, and torch's implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from ema_server.tensors.finite import is_finite

Weighted: TypeAlias = tuple[torch.Tensor, float]
"""The elements of an average (1-D, contiguous, float32 or float64), and the weight of the new elements in it."""

Moved: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]
"""The elements of an average as in `Weighted`, where the updated ones are written, and the weight of the new ones."""


class Elements:
    """Elements of a snapshot (1-D, contiguous), in the wire's dtype and in those that averages are held in.

    Args:
        source: the elements in the wire's dtype.
        scratch: memory for conversions, by dtype; overwritten.
    """

    __slots__ = ("_found", "_scratch", "source")

    def __init__(self, source: torch.Tensor, scratch: Mapping[torch.dtype, torch.Tensor]) -> None:
        self.source = source
        self._scratch = scratch
        self._found = {source.dtype: source}

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The elements in `dtype`, converted at the first call."""
        if dtype not in self._found:
            self._found[dtype] = self._scratch[dtype].narrow(0, 0, len(self.source)).copy_(self.source)
        return self._found[dtype]


class Arithmetic(Protocol):
    """One implementation. Several threads may share it."""

    @property
    def name(self) -> str:
        """As in the settings."""

    @property
    def can_move(self) -> bool:
        """Whether `lerp_into` costs no more than `lerp`. It is not called otherwise."""

    def lerp(self, elements: Elements, averages: Sequence[Weighted]) -> None:
        """`average += weight * (elements - average)` for each, in its own dtype.

        This form stays unbiased in float32, where `decay * average + (1 - decay) * elements` drifts: its two rounded
        factors do not add up to 1.
        """

    def lerp_into(self, elements: Elements, averages: Sequence[Moved]) -> bool:
        """Write what `lerp` computes elsewhere; returns whether all new elements are finite.

        At least one average has a weight; `old` and `new` do not overlap.
        """


class ByTorch:
    """`torch.lerp_`, one average at a time."""

    name = "torch"
    can_move = False  # it would read what it overwrites, which costs as much as a check beforehand

    def lerp(self, elements: Elements, averages: Sequence[Weighted]) -> None:
        for average, weight in averages:
            average.lerp_(elements.to(average.dtype), weight)

    def lerp_into(self, elements: Elements, averages: Sequence[Moved]) -> bool:
        for old, new, weight in averages:
            torch.lerp(old, elements.to(old.dtype), weight, out=new)
        return is_finite(elements.source)


BY_TORCH = ByTorch()
