"""Which bytes of an average go where in its safetensors files. Pure arithmetic on offsets.

Headers contain nothing that varies between versions. Tensors lie in memory order by stored item size, large first; tied
names are further copies at the end of their size. So every tensor is aligned, and a plain model is one sequential
write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_proto.wire.manifest import Manifest
from ema_server.tensors.layout import Form, Place, places
from ema_server.tensors.safetensors_file import describe

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `begin` to `end` of an average's memory, at `file_offset` in the file; `narrows`: float64 as float32."""

    begin: int
    end: int
    file_offset: int
    narrows: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """The tensor of a tied name: the bytes at `source` again at `target`, both in the file."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One file of an average: header, size, and where its other bytes come from. `spans` are in memory order."""

    name: str
    header: bytes
    nbytes: int
    spans: tuple[Span, ...]
    copies: tuple[Copy, ...]


def files_of(manifest: Manifest, form: Form) -> tuple[TensorFile, ...]:
    """The files of an average of this form: `model.safetensors`, and `state.safetensors` for float64 accumulators.

    The model has its floats as float32, or as sent for a `WIRE` average.
    """
    held = places(manifest, form)
    model = _file(MODEL_FILE, held, {place.dtype: _published(form, place.dtype) for place in held})
    exact = [place for place in held if form is not Form.WIRE and place.dtype == "F64"]
    return (model, _file(STATE_FILE, exact, {"F64": "F64"})) if exact else (model,)


def snapshot_file(manifest: Manifest, name: str) -> TensorFile:
    """The file of one snapshot of a window, as it was sent."""
    return accumulator_file(manifest, Form.WIRE, name)


def accumulator_file(manifest: Manifest, form: Form, name: str) -> TensorFile:
    """The file of all bytes of a memory of this form, in the dtypes that they are held in."""
    held = places(manifest, form)
    return _file(name, held, {place.dtype: place.dtype for place in held})


def _published(form: Form, dtype: str) -> str:
    return dtype if form is Form.WIRE or dtype not in FLOATS else "F32"


def _file(name: str, held: Iterable[Place], stored: dict[str, str]) -> TensorFile:
    """`stored` has the dtype in the file for each dtype in memory."""
    entries = list(_entries(list(held), lambda place: ITEM_BYTES[stored[place.dtype]]))
    header, placed = describe((name, stored[place.dtype], place.tensor.shape) for name, place in entries)
    spans, copies, first = list[Span](), list[Copy](), dict[str, int]()
    for (_, place), at in zip(entries, placed, strict=True):
        original = place.tensor.name
        if at.name == original:
            first[original] = at.offset
            spans.append(Span(place.offset, place.offset + place.nbytes, at.offset, at.dtype != place.dtype))
        elif at.nbytes:
            copies.append(Copy(first[original], at.offset, at.nbytes))
    spans.sort(key=lambda span: span.begin)
    nbytes = placed[-1].offset + placed[-1].nbytes if placed else len(header)
    return TensorFile(name, header, nbytes, tuple(_merged(spans)), tuple(copies))


def _entries(held: list[Place], size: Callable[[Place], int]) -> Iterator[tuple[str, Place]]:
    """Every name with its tensor, in the order of the file."""
    for _, group in groupby(sorted(held, key=size, reverse=True), key=size):
        alike = list(group)
        yield from ((place.tensor.name, place) for place in alike)
        yield from ((alias, place) for place in alike for alias in place.tensor.aliases)


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    last: Span | None = None
    for span in spans:
        if span.begin == span.end:
            continue
        if last is not None and _follows(span, last):
            last = Span(last.begin, span.end, last.file_offset, last.narrows)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _follows(span: Span, last: Span) -> bool:
    stored_end = last.file_offset + last.end - last.begin
    return not (last.narrows or span.narrows) and (last.end, stored_end) == (span.begin, span.file_offset)
