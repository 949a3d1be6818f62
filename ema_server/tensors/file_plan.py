"""The safetensors files of an average, as plans: header bytes, and which bytes of memory go where. Pure arithmetic.

Comes in: the manifest and the form in which an average is held. Goes out: `TensorFile`s. The header holds nothing that
varies between versions. Tensors lie in memory order by stored item size, large first, each tied name as a further copy
at the end of its size, so that every tensor is aligned and a plain model is one sequential write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """Bytes `begin` to `end` of an average's memory, stored from byte `file_offset`; `narrows`: float64 as float32."""

    begin: int
    end: int
    file_offset: int
    narrows: bool


@dataclass(frozen=True, slots=True)
class Copy:
    """A tied name's tensor: the same bytes again at `target`."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One file of an average: its first bytes, its size, and where the rest comes from. `spans` are in memory order."""

    name: str
    header: bytes
    nbytes: int
    spans: tuple[Span, ...]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    place: Place
    is_alias: bool

    @property
    def nbytes(self) -> int:
        return self.place.tensor.elements * ITEM_BYTES[self.dtype]


def files_of(manifest: Manifest, form: Form) -> tuple[TensorFile, ...]:
    """The files that hold an average of this form: `model.safetensors`, and `state.safetensors` if that is not all.

    The model has its floats as float32 (a `WIRE` average: as they are). Float64 accumulators lose bits there, so the
    state keeps them whole beside it.
    """
    held = places(manifest, form)
    model = _file(MODEL_FILE, held, {place.dtype: _published(form, place.dtype) for place in held})
    exact = [place for place in held if form is not Form.WIRE and place.dtype == "F64"]
    return (model, _file(STATE_FILE, exact, {"F64": "F64"})) if exact else (model,)


def snapshot_file(manifest: Manifest, name: str) -> TensorFile:
    """The file that holds one snapshot of a window, as it was sent."""
    held = places(manifest, Form.WIRE)
    return _file(name, held, {place.dtype: place.dtype for place in held})


def _published(form: Form, dtype: str) -> str:
    return dtype if form is Form.WIRE or dtype not in FLOATS else "F32"


def _file(name: str, held: Iterable[Place], stored: dict[str, str]) -> TensorFile:
    entries = list(_entries(list(held), stored))
    header, _ = describe((entry.name, entry.dtype, entry.place.tensor.shape) for entry in entries)
    position, spans, copies, first = len(header), list[Span](), list[Copy](), dict[str, int]()
    for entry in entries:
        original = entry.place.tensor.name
        if entry.is_alias:
            copies.append(Copy(first[original], position, entry.nbytes))
        else:
            first[original] = position
            begin = entry.place.offset
            spans.append(Span(begin, begin + entry.place.nbytes, position, entry.dtype != entry.place.dtype))
        position += entry.nbytes
    spans.sort(key=lambda span: span.begin)
    return TensorFile(name, header, position, tuple(_merged(spans)), tuple(copy for copy in copies if copy.nbytes))


def _entries(held: list[Place], stored: dict[str, str]) -> Iterator[_Entry]:
    def size(place: Place) -> int:
        return ITEM_BYTES[stored[place.dtype]]

    for _, group in groupby(sorted(held, key=size, reverse=True), key=size):
        alike = list(group)
        yield from (_Entry(place.tensor.name, stored[place.dtype], place, False) for place in alike)
        for place in alike:
            yield from (_Entry(alias, stored[place.dtype], place, True) for alias in place.tensor.aliases)


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    last: Span | None = None
    for span in spans:
        if span.begin == span.end:
            continue
        if last is None:
            last = span
        elif not (last.narrows or span.narrows) and last.end == span.begin and _stored_end(last) == span.file_offset:
            last = Span(last.begin, span.end, last.file_offset, False)
        else:
            yield last
            last = span
    if last is not None:
        yield last


def _stored_end(span: Span) -> int:
    return span.file_offset + span.end - span.begin
