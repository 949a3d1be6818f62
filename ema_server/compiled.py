"""The averaging arithmetic in loops that numba compiles: one reading of the weights updates several averages.

Comes in: elements of a snapshot as they were sent, and averages with a weight each. Goes out: the averages, updated.
It computes what `torch.lerp_` computes, to the last bit where both have the same fused multiply-add. Importing it needs
the extra `fast`. It knows nothing of runs, blocks and files, and allocates nothing of their size.

bfloat16 becomes float32 in a register, where torch has to write it out as float32 first; and weights that several
averages share cross the memory bus once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numba
import numpy as np
import torch

GROUP_MAX = 4  # averages in one loop: more pointers than these and LLVM stops vectorising it

_SOURCES = frozenset({torch.bfloat16, torch.float32, torch.float64})
_SMALL_WEIGHT = 0.5  # from here on torch computes new - (1 - weight) * (new - old)

Mixed = tuple[torch.Tensor, float]


def mixes(source: torch.dtype, held: torch.dtype, weight: float) -> bool:
    """Whether `mix` computes this: not for float16 weights, and not from a weight of one half on."""
    return source in _SOURCES and source.itemsize <= held.itemsize and abs(_rounded(weight, held)) < _SMALL_WEIGHT


def mix(source: torch.Tensor, averages: Iterable[Mixed]) -> None:
    """`average += weight * (source - average)` for each average, in its own dtype.

    Args:
        source: 1-D, contiguous, bfloat16, float32 or float64.
        averages: pairs of an average (1-D, contiguous, float32 or float64, of the source's length) and its weight, for
            which `mixes` says yes.
    """
    loop, elements = _loop(source)
    for group in _groups(averages):
        held = tuple(average.numpy() for average, _ in group)
        loop(elements, held, tuple(held[0].dtype.type(weight) for _, weight in group))


def warm_up() -> None:
    """Compile the loop that most runs need; the others are compiled at their first use, in about 0.2 s each.

    Raises:
        ImportError, OSError, RuntimeError: this machine cannot compile it, or it computes nonsense.
    """
    average = torch.zeros(3)
    mix(torch.tensor([1.0, 2.0, 4.0]), [(average, 0.25)])
    if average.tolist() != [0.25, 0.5, 1.0]:
        raise RuntimeError(f"numba {numba.__version__} computes {average.tolist()} where [0.25, 0.5, 1.0] is right")


def _loop(source: torch.Tensor) -> tuple[Callable[..., None], Any]:
    """The loop for the source's dtype, and the source as numpy knows it, which has no bfloat16."""
    if source.dtype is torch.bfloat16:
        return _mix_bfloat16, source.view(torch.uint16).numpy()
    return _mix_same, source.numpy()


def _groups(averages: Iterable[Mixed]) -> Iterator[Sequence[Mixed]]:
    """Averages of one dtype, at most `GROUP_MAX` of them."""
    by_dtype: dict[torch.dtype, list[Mixed]] = {}
    for pair in averages:
        by_dtype.setdefault(pair[0].dtype, []).append(pair)
    for alike in by_dtype.values():
        for first in range(0, len(alike), GROUP_MAX):
            yield alike[first : first + GROUP_MAX]


def _rounded(weight: float, held: torch.dtype) -> float:
    """The weight as torch takes it: in the average's dtype."""
    return float(np.float32(weight)) if held is torch.float32 else weight


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
_mix_same: Callable[..., None] = _compiled(_same)
_mix_bfloat16: Callable[..., None] = _compiled(_bfloat16)
