"""Where each element lies in a snapshot, and in the memory of an average. Pure arithmetic on offsets.

An average is held in one of three forms. `WIRE` is the snapshot's own bytes. `WIDE` has every float as float32, or
float64 where the wire has float64; `EXACT` has every float as float64; other tensors are as on the wire. Tensors lie by
item size, large first, then in the order of the wire, so every element is aligned to its own size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby

from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_proto.wire.manifest import Manifest, TensorSpec


class Form(Enum):
    WIRE = "wire"
    WIDE = "wide"
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Place:
    """The position and dtype of one tensor in an average's memory."""

    tensor: TensorSpec
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        return self.tensor.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` elements of one wire dtype, contiguous in the snapshot and in every form.

    Average number i averages them if bit i of `averaged` is set, and copies them otherwise.
    """

    dtype: str
    averaged: int
    count: int
    wire_offset: int
    wide_offset: int
    exact_offset: int

    @property
    def wire_end(self) -> int:
        """The first byte after the segment in the snapshot."""
        return self.wire_offset + self.count * ITEM_BYTES[self.dtype]

    def part(self, start: int, count: int) -> Segment:
        offsets = (self.offset(form) + start * ITEM_BYTES[held_dtype(form, self.dtype)] for form in Form)
        return Segment(self.dtype, self.averaged, count, *offsets)

    def offset(self, form: Form) -> int:
        """The first byte of the segment in an average of this form."""
        match form:
            case Form.WIRE:
                return self.wire_offset
            case Form.WIDE:
                return self.wide_offset
            case Form.EXACT:
                return self.exact_offset


def held_dtype(form: Form, dtype: str) -> str:
    """The dtype in which an average of this form holds a tensor of wire dtype `dtype`."""
    if form is Form.WIRE or dtype not in FLOATS:
        return dtype
    return "F64" if form is Form.EXACT or dtype == "F64" else "F32"


def places(manifest: Manifest, form: Form) -> tuple[Place, ...]:
    """Where the tensors lie in an average of this form, in memory order, without gaps."""
    dtypes = {dtype: held_dtype(form, dtype) for dtype in ITEM_BYTES}
    by_size: dict[int, list[TensorSpec]] = {size: [] for size in sorted(set(ITEM_BYTES.values()), reverse=True)}
    for tensor in manifest.by_offset:
        by_size[ITEM_BYTES[dtypes[tensor.dtype]]].append(tensor)
    position, found = 0, list[Place]()
    for size, tensors in by_size.items():
        for tensor in tensors:
            found.append(Place(tensor, dtypes[tensor.dtype], position))
            position += tensor.elements * size
    return tuple(found)


def held_nbytes(manifest: Manifest, form: Form) -> int:
    sizes = {dtype: ITEM_BYTES[held_dtype(form, dtype)] for dtype in ITEM_BYTES}
    return sum(tensor.elements * sizes[tensor.dtype] for tensor in manifest.tensors)


def segments(manifest: Manifest, mask: Callable[[TensorSpec], int]) -> tuple[Segment, ...]:
    """The snapshot as few long segments, in memory order; empty tensors are in none. `mask` is `Segment.averaged`."""
    offsets = [{place.tensor.name: place.offset for place in places(manifest, form)} for form in Form]
    filled = ((tensor, tensor.elements) for tensor in manifest.by_offset)
    marked = ((tensor.dtype, mask(tensor), tensor.name, count) for tensor, count in filled if count)
    merged: list[Segment] = []
    for (dtype, averaged), group in groupby(marked, key=lambda tensor: tensor[:2]):
        alike = list(group)
        first, count = alike[0][2], sum(tensor[3] for tensor in alike)
        merged.append(Segment(dtype, averaged, count, *(of_form[first] for of_form in offsets)))
    return tuple(merged)


def cut(whole: Iterable[Segment], block_elements: int) -> Iterator[Segment]:
    """The same elements in the same order, in segments of at most `block_elements`."""
    for one in whole:
        for start in range(0, one.count, block_elements):
            yield one.part(start, min(block_elements, one.count - start))


def take_out(
    whole: Iterable[Segment], tensors: Iterable[TensorSpec]
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """All segments without these tensors, and these tensors alone, with every bit of the masks set."""
    rest, taken = list[Segment](), list[Segment]()
    pending = deque(sorted((tensor for tensor in tensors if tensor.elements), key=lambda tensor: tensor.offset))
    for one in whole:
        start = 0
        while pending and pending[0].offset < one.wire_end:
            tensor = pending.popleft()
            first = (tensor.offset - one.wire_offset) // ITEM_BYTES[one.dtype]
            rest.append(one.part(start, first - start))
            taken.append(replace(one.part(first, tensor.elements), averaged=-1))
            start = first + tensor.elements
        rest.append(one.part(start, one.count - start) if start else one)
    return tuple(one for one in rest if one.count), tuple(taken)
