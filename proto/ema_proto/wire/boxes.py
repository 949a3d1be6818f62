"""Boxes: the rectangular pieces of tensors that the ranks of a sharded trainer hold.

Positions in a tensor, and in a box, are counted in elements, in row-major order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_CUT_DIMENSIONS_MAX = 4  # no mesh shards a tensor along more; the time to find a fault grows with this power


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The elements of a tensor from `offsets` to `offsets + sizes`, one number for each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        spans = (f"{low}:{low + size}" for low, size in zip(self.offsets, self.sizes, strict=True))
        return f"[{', '.join(spans)}]"


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor of `shape`."""
    return Box((0,) * len(shape), tuple(shape))


def lies_within(box: Box, shape: Sequence[int]) -> bool:
    """Whether the box has the dimensions of `shape` and no element outside it."""
    if not len(box.offsets) == len(box.sizes) == len(shape):
        return False
    spans = zip(box.offsets, box.sizes, shape, strict=True)
    return all(low >= 0 and size >= 0 and low + size <= full for low, size, full in spans)


def _place(box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return box.offsets, box.sizes


def tiling_fault(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Describe the first overlap or hole of distinct boxes that should cover a tensor of `shape` exactly once.

    Boxes must be cut along one dimension after another, as a device mesh cuts them, and along at most 4.

    Returns:
        None if each element lies in exactly one box.
    """
    cuts = sorted(boxes, key=_place)
    cut = [dimension for dimension, full in enumerate(shape) if any(box.sizes[dimension] < full for box in cuts)]
    if len(cut) > _CUT_DIMENSIONS_MAX:
        return f"boxes are cut along {len(cut)} dimensions, allowed are {_CUT_DIMENSIONS_MAX}"
    return _fault(whole(shape), cuts)


def _fault(region: Box, boxes: list[Box]) -> str | None:
    if region.elements == 0:
        return None
    if not boxes:
        return f"{region} is held by no rank"
    if boxes == [region]:
        return None
    first: str | None = None
    for dimension, size in enumerate(region.sizes):
        if any(box.sizes[dimension] < size for box in boxes):
            fault = _fault_along(region, boxes, dimension)
            if fault is None:
                return None
            first = first or fault
    return first


def _fault_along(region: Box, boxes: list[Box], dimension: int) -> str | None:
    """The first fault if `region` is cut along `dimension` first."""
    slabs: defaultdict[tuple[int, int], list[Box]] = defaultdict(list)
    for box in boxes:
        slabs[box.offsets[dimension], box.sizes[dimension]].append(box)
    position, before = region.offsets[dimension], boxes[0]
    for (low, size), held in sorted(slabs.items()):
        if low < position:
            return f"{before} and {held[0]} overlap"
        if low > position:
            return f"{_slab(region, dimension, position, low - position)} is held by no rank"
        fault = None if _is_slab(region, dimension, held) else _fault(_slab(region, dimension, low, size), held)
        if fault is not None:
            return fault
        position, before = low + size, held[0]
    end = region.offsets[dimension] + region.sizes[dimension]
    return f"{_slab(region, dimension, position, end - position)} is held by no rank" if position < end else None


def _is_slab(region: Box, dimension: int, boxes: list[Box]) -> bool:
    """Whether this is one box that is cut out of `region` along `dimension` alone."""
    box, after = boxes[0], dimension + 1
    return (
        len(boxes) == 1
        and box.sizes[after:] == region.sizes[after:]
        and box.offsets[after:] == region.offsets[after:]
        and box.sizes[:dimension] == region.sizes[:dimension]
        and box.offsets[:dimension] == region.offsets[:dimension]
    )


def _slab(region: Box, dimension: int, low: int, size: int) -> Box:
    """The part of `region` that has `size` elements from `low` along `dimension`."""
    offsets, sizes = list(region.offsets), list(region.sizes)
    offsets[dimension], sizes[dimension] = low, size
    return Box(tuple(offsets), tuple(sizes))


def pieces(sizes: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the elements from `start` to `stop` of a box of `sizes` into boxes, in row-major order.

    Their offsets count from the box's first element. Without dimensions there is one element.
    """
    if start >= stop:
        return
    if not sizes:
        yield Box((), ())
        return
    row = math.prod(sizes[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # both ends lie inside one row
        yield from _in_row(sizes, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(sizes, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0 for _ in sizes[1:])), (last - first, *sizes[1:]))
    if last * row < stop:
        yield from _in_row(sizes, last, 0, stop - last * row)


def _in_row(sizes: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for piece in pieces(sizes[1:], start, stop):
        yield Box((row, *piece.offsets), (1, *piece.sizes))
