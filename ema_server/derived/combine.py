"""The weighted sum of stored model files, piece by piece.

Sums are in float64 and rounded once, to float32: besides the rounding of the stored weights, the error is half a unit
in the last place. Copied tensors come from the first file. All bytes are verified against the sha256 of their file
before the last piece is returned.

Shares of both signs can make a variance of batch norm negative, and the network useless. A mean of variances is not
below the smallest of them, so the sum is clamped to the smallest stored value.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path

import torch

from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_server.derived.store import Piece
from ema_server.storage.disk import sha256
from ema_server.storage.records import BrokenGeneration
from ema_server.tensors.dtypes import TORCH_DTYPES
from ema_server.tensors.safetensors_file import BadModelFile, Stored, describe, read_header

_CHUNK_ELEMENTS = 1 << 17  # 1 MiB of sums stays in a core's cache
_COPY_BYTES = 1 << 20
_VARIANCE = "running_var"  # torch's name, in every class of batch norm


class NotFinite(ArithmeticError):
    """A sum is NaN or Inf; the text names the tensor."""


@dataclass(frozen=True, slots=True)
class Term:
    """One model file, the sha256 that it must have, and its share in the sum."""

    path: Path
    sha256: str
    share: float


class _Kind(Enum):
    COPIED = "taken from the first file"
    SUMMED = "the sum"
    VARIANCE = "the sum, not below the smallest stored value"


@dataclass(frozen=True, slots=True)
class _Region:
    """Tensors of one kind and dtype that lie one after the other in every file and in the result."""

    kind: _Kind
    tensors: tuple[Stored, ...]  # as in the first file

    @property
    def elements(self) -> int:
        return sum(one.elements for one in self.tensors)

    def name_at(self, element: int) -> str:
        """The name of the tensor that has this element of the region."""
        ends = list(accumulate(one.elements for one in self.tensors))
        return self.tensors[bisect_right(ends, element)].name


class _Source:
    """One stored file. Its digest is computed on the way while it is read in its own order, else in the end."""

    def __init__(self, term: Term) -> None:
        self.path = term.path
        self.share = term.share
        self.stored = {one.name: one for one in read_header(self.path)}
        self._sha256 = term.sha256
        self._digest = hashlib.sha256()
        self._position = 0
        self._size = self.path.stat().st_size
        self._read(0, min((one.offset for one in self.stored.values()), default=self._size))

    def elements(self, region: _Region, first: int, count: int) -> torch.Tensor:
        """`count` elements of a region of one dtype, from number `first` on."""
        start = self.stored[region.tensors[0].name]
        begin = start.offset + first * ITEM_BYTES[start.dtype]
        data = self._read(begin, begin + count * ITEM_BYTES[start.dtype])
        return torch.frombuffer(data, dtype=TORCH_DTYPES[start.dtype])

    def pieces(self, region: _Region) -> Iterator[bytearray]:
        """The bytes of a region."""
        begin, end = self.stored[region.tensors[0].name].offset, _end(self.stored[region.tensors[-1].name])
        for at in range(begin, end, _COPY_BYTES):
            yield self._read(at, min(at + _COPY_BYTES, end))

    def continues(self, name: str, next_name: str) -> bool:
        """Whether the next tensor begins where this one ends, and has its dtype."""
        stored, following = self.stored[name], self.stored[next_name]
        return _end(stored) == following.offset and stored.dtype == following.dtype

    def check(self) -> None:
        found = self._digest.hexdigest() if self._position == self._size else sha256(self.path)
        if found != self._sha256:
            raise BrokenGeneration(f"{self.path} has sha256 {found} instead of {self._sha256}")

    def _read(self, begin: int, end: int) -> bytearray:
        piece = bytearray(end - begin)
        with self.path.open("rb") as file:  # not kept open: there may be more files than the limit of open ones
            file.seek(begin)
            file.readinto(piece)
        if begin == self._position:
            self._digest.update(piece)
            self._position = end
        return piece


def combined(terms: Sequence[Term], copied: frozenset[str]) -> Iterator[Piece]:
    """The bytes of the model file that is the sum of other model files.

    Args:
        terms: what is added up, one or more; with share 0 a file is only verified.
        copied: names of the tensors that are copied from the first file. Those that are not floats are copied too.

    Raises:
        BrokenGeneration: a file has another sha256 than it must have.
        BadModelFile: the files do not hold the same tensors.
        NotFinite: a sum is NaN or Inf.
        OSError: the disk fails, or a file was deleted meanwhile.
    """
    first, *others = sources = [_Source(term) for term in terms]
    for other in others:
        _check_alike(first, other)
    tensors = [(_kind(stored, copied), stored) for stored in first.stored.values()]
    tensors.sort(key=lambda each: -ITEM_BYTES[_dtype(*each)])  # larger items first: so every tensor is aligned
    header, _ = describe((stored.name, _dtype(kind, stored), stored.shape) for kind, stored in tensors)
    yield header
    for region in _regions(tensors, sources):
        yield from _copy(sources, region) if region.kind is _Kind.COPIED else _sum(sources, region)
    for source in sources:
        source.check()


def _check_alike(first: _Source, other: _Source) -> None:
    shapes, others = ({one.name: one.shape for one in source.stored.values()} for source in (first, other))
    if shapes != others:
        raise BadModelFile(f"{other.path} holds other tensors than {first.path}, to which it is to be added")


def _kind(stored: Stored, copied: frozenset[str]) -> _Kind:
    if stored.dtype not in FLOATS or stored.name in copied:
        return _Kind.COPIED
    return _Kind.VARIANCE if stored.name.rpartition(".")[2] == _VARIANCE else _Kind.SUMMED


def _dtype(kind: _Kind, stored: Stored) -> str:
    return stored.dtype if kind is _Kind.COPIED else "F32"


def _end(stored: Stored) -> int:
    return stored.offset + stored.nbytes


def _regions(tensors: Sequence[tuple[_Kind, Stored]], sources: Sequence[_Source]) -> Iterator[_Region]:
    """The tensors in order; each region as large as possible, since models may have thousands of small tensors."""
    kind, region = _Kind.COPIED, list[Stored]()
    for next_kind, stored in tensors:
        continues = bool(region) and next_kind is kind
        if continues and all(source.continues(region[-1].name, stored.name) for source in sources):
            region.append(stored)
            continue
        if region:
            yield _Region(kind, tuple(region))
        kind, region = next_kind, [stored]
    if region:
        yield _Region(kind, tuple(region))


def _sum(sources: Sequence[_Source], region: _Region) -> Iterator[memoryview]:
    for first in range(0, region.elements, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, region.elements - first)
        total = _total(sources, region, first, count)
        rounded = bytearray(count * ITEM_BYTES["F32"])
        values = torch.frombuffer(rounded, dtype=torch.float32).copy_(total)
        if not bool(values.isfinite().all()):
            name = region.name_at(first + int(values.isfinite().logical_not().nonzero()[0]))
            raise NotFinite(f"the sum of tensor {name!r} is NaN or Inf")
        yield memoryview(rounded)


def _total(sources: Sequence[_Source], region: _Region, first: int, count: int) -> torch.Tensor:
    total, smallest = torch.zeros(count, dtype=torch.float64), None
    for source in sources:
        values = source.elements(region, first, count).double()  # mixed dtypes take three times as long
        if not source.share:
            continue
        total.add_(values, alpha=source.share)
        if region.kind is _Kind.VARIANCE:
            smallest = values if smallest is None else torch.minimum(smallest, values)
    return total if smallest is None else torch.maximum(total, smallest)


def _copy(sources: Sequence[_Source], region: _Region) -> Iterator[bytearray]:
    first, *others = sources
    yield from first.pieces(region)
    for other in others:  # whole files are verified
        for _ in other.pieces(region):
            pass
