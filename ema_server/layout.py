"""Where each element lies: in a snapshot, in an average's memory, in its file. Pure arithmetic on offsets.

Comes in: the manifest of a run and the names of its exempt tensors. Goes out: `Segment`s, long runs of elements that
are treated alike, for the kernel. It allocates nothing of a model's size and has never seen a tensor.

An average is held in one of two forms. `WIRE` is the snapshot's own bytes. `WIDE` has every float as float32, or
float64 where the wire says float64; the rest is as on the wire. Both keep the order of the wire, in which item sizes
fall, so every element stays aligned to its own size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_proto.manifest import Manifest, Role, TensorSpec


class Form(Enum):
    """How an average is held in memory."""

    WIRE = "wire"
    WIDE = "wide"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in an average's memory, and in which dtype."""

    tensor: TensorSpec
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in the average's memory, in bytes."""
        return self.tensor.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` elements of one wire dtype, side by side in the snapshot and in both forms, all treated alike.

    `buffer` says that all are of buffers; where buffers need not be told apart, it is False.
    """

    dtype: str
    averaged: bool
    count: int
    wire_offset: int
    wide_offset: int
    buffer: bool = False

    def offset(self, form: Form) -> int:
        """First byte of the segment in an average of this form."""
        return self.wire_offset if form is Form.WIRE else self.wide_offset


def held_dtype(form: Form, dtype: str) -> str:
    """The dtype in which an average of this form holds a tensor of wire dtype `dtype`."""
    return "F32" if form is Form.WIDE and dtype in FLOATS and dtype != "F64" else dtype


def places(manifest: Manifest, form: Form) -> tuple[Place, ...]:
    """Where the tensors lie in an average of this form, in memory order, without gaps."""
    return tuple(_places(manifest, form))


def held_nbytes(manifest: Manifest, form: Form) -> int:
    """Bytes of one average of this form."""
    return sum(place.nbytes for place in _places(manifest, form))


def is_averaged(tensor: TensorSpec, exempt: frozenset[str]) -> bool:
    """Whether averaging rules apply to a tensor; otherwise its newest value is copied."""
    return tensor.is_float and tensor.role is not Role.STRUCTURAL and tensor.name not in exempt


def segments(
    manifest: Manifest, exempt: frozenset[str] = frozenset(), *, buffers_apart: bool = False
) -> tuple[Segment, ...]:
    """The snapshot as few long runs, in memory order. Empty tensors are in none.

    Args:
        manifest: the run's manifest.
        exempt: names of tensors that are copied.
        buffers_apart: no run holds buffers together with weights; needed where an average copies its buffers.
    """
    merged: list[Segment] = []
    for place in _places(manifest, Form.WIDE):
        tensor = place.tensor
        if not tensor.elements:
            continue
        averaged, buffer = is_averaged(tensor, exempt), buffers_apart and tensor.role is Role.BUFFER
        new = Segment(tensor.dtype, averaged, tensor.elements, tensor.offset, place.offset, buffer)
        last = merged[-1] if merged else None
        if last is not None and (last.dtype, last.averaged, last.buffer) == (new.dtype, averaged, buffer):
            merged[-1] = replace(last, count=last.count + new.count)
        else:
            merged.append(new)
    return tuple(merged)


def cut(runs: Iterable[Segment], block_elements: int) -> Iterator[Segment]:
    """The same elements in the same order, in pieces of at most `block_elements`."""
    for run in runs:
        item = ITEM_BYTES[run.dtype]
        wide_item = ITEM_BYTES[held_dtype(Form.WIDE, run.dtype)]
        for start in range(0, run.count, block_elements):
            count = min(block_elements, run.count - start)
            wire_offset, wide_offset = run.wire_offset + start * item, run.wide_offset + start * wide_item
            yield Segment(run.dtype, run.averaged, count, wire_offset, wide_offset, run.buffer)


def _places(manifest: Manifest, form: Form) -> Iterator[Place]:
    position = 0
    for tensor in manifest.by_offset:
        place = Place(tensor, held_dtype(form, tensor.dtype), position)
        position += place.nbytes
        yield place
