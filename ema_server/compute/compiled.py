"""The averaging arithmetic in loops that numba compiles: one read of the weights updates several averages.

It computes what `torch.lerp_` computes, bit for bit where both use the same fused multiply-add. bfloat16 becomes
float32 in a register, where torch writes it out as float32 first. Importing this module needs the extra `fast`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from numba.core.errors import NumbaError

from ema_server.compute.arithmetic import BY_TORCH, Elements, Moved, Weighted
from ema_server.compute.checked import lerp_into

logger = logging.getLogger(__name__)

GROUP_MAX = 4  # averages per loop: each number is compiled on its own, and LLVM does not vectorise 8 or more

# From 0.5 on torch computes new - (1 - weight) * (new - old), with the weight rounded to the average's dtype.
_LARGE_WEIGHT = 0.4999999


class ByLoops:
    """Compiled loops on the CPU; torch for large weights, which occur only in the first steps and at wide gaps.

    The loop that most runs need is compiled here, the others at their first use, each in some tenths of a second. They
    are not cached on disk: numba's cache consists of pickles, in a folder that may not be writable.

    Raises:
        RuntimeError: this machine cannot compile the loops, or they give wrong results.
    """

    name = "compiled"

    def __init__(self) -> None:
        average = torch.zeros(3)
        try:
            _lerp(torch.tensor([1.0, 2.0, 4.0]), [(average, 0.25)])
        except NumbaError as error:
            raise RuntimeError(f"numba {numba.__version__} cannot compile here: {error}") from error
        if average.tolist() != [0.25, 0.5, 1.0]:
            raise RuntimeError(f"numba {numba.__version__} computes {average.tolist()} where [0.25, 0.5, 1.0] is right")

    @cached_property
    def can_move(self) -> bool:
        """Whether the loop of `lerp_into` works here; it is compiled at the first question."""
        old, new = torch.zeros(64), torch.zeros(64)
        try:
            return lerp_into(torch.ones(64), [(old, new, 0.25)]) and bool((new == 0.25).all())
        except (NumbaError, RuntimeError) as error:  # LLVM's errors are RuntimeErrors
            logger.warning("snapshots are checked before they are averaged, which takes longer: %s", error)
            return False

    def lerp(self, elements: Elements, averages: Sequence[Weighted]) -> None:
        source = _source(elements)
        small = [pair for pair in averages if abs(pair[1]) < _LARGE_WEIGHT]
        _lerp(source, small)
        if len(small) < len(averages):
            BY_TORCH.lerp(elements, [pair for pair in averages if abs(pair[1]) >= _LARGE_WEIGHT])

    def lerp_into(self, elements: Elements, averages: Sequence[Moved]) -> bool:
        small = [each for each in averages if abs(each[2]) < _LARGE_WEIGHT]
        finite = not small or lerp_into(_source(elements), small)
        if len(small) < len(averages):
            large = [each for each in averages if abs(each[2]) >= _LARGE_WEIGHT]
            finite &= BY_TORCH.lerp_into(elements, large)
        return finite


def _source(elements: Elements) -> torch.Tensor:
    """The elements in a dtype that the loops read: they have no float16."""
    return elements.to(torch.float32) if elements.source.dtype is torch.float16 else elements.source


def _lerp(source: torch.Tensor, averages: Sequence[Weighted]) -> None:
    """`source` is bfloat16, float32 or float64, and no wider than the averages."""
    loop, new = _lerp_same, source
    if source.dtype is torch.bfloat16:
        loop, new = _lerp_bfloat16, source.view(torch.uint16)  # numpy has no bfloat16
    for group in _groups(averages):
        held = tuple([average.numpy() for average, _ in group])
        as_held = held[0].dtype.type
        loop(new.numpy(), held, tuple([as_held(weight) for _, weight in group]))


def _groups(averages: Sequence[Weighted]) -> Iterator[Sequence[Weighted]]:
    """Averages of one dtype, at most `GROUP_MAX` of them."""
    for dtype in (torch.float32, torch.float64):
        alike = [pair for pair in averages if pair[0].dtype is dtype]
        for first in range(0, len(alike), GROUP_MAX):
            yield alike[first : first + GROUP_MAX]


def _same(source: Any, averages: Any, weights: Any) -> None:
    for i in range(source.size):
        new = source[i]
        for k in range(len(averages)):
            old = averages[k][i]
            averages[k][i] = old + weights[k] * (new - old)


def _bfloat16(source: Any, averages: Any, weights: Any) -> None:
    for i in range(source.size):
        new = np.int32(np.uint32(source[i]) << np.uint32(16)).view(np.float32)
        for k in range(len(averages)):
            old = averages[k][i]
            averages[k][i] = old + weights[k] * (new - old)


# `contract` lets LLVM fuse the multiplication with the addition, as torch's own loops do; nothing else is relaxed.
_compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
_lerp_same: Callable[..., None] = _compiled(_same)
_lerp_bfloat16: Callable[..., None] = _compiled(_bfloat16)
