"""The weighted sum of stored model files, piece by piece.

Sums are in float64 and rounded once, to float32: besides the rounding of the stored weights, which the plan reports,
the error is half a unit in the last place. Copied tensors come from the newest part. All bytes read are verified
against the sha256 of their file before the last piece is returned.

Shares of both signs can make a variance of batch norm negative, and the network useless. A mean of variances is not
below the smallest of them, so the sum is clamped to the smallest stored value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.derived.plan import Part, Plan
from ema_server.derived.store import Piece
from ema_server.storage.records import BrokenGeneration
from ema_server.tensors.dtypes import TORCH_DTYPES
from ema_server.tensors.safetensors_file import BadModelFile, Stored, describe, read_header

_CHUNK_ELEMENTS = 1 << 17  # 1 MiB of sums stays in a core's cache
_FLOATS = ("F32", "BF16")  # the dtypes of averaged tensors in a ring
_VARIANCE = "running_var"  # torch's name, in every class of batch norm


class _Kind(Enum):
    COPIED = "taken from the newest part"
    SUMMED = "the sum"
    VARIANCE = "the sum, not below the smallest stored value"


@dataclass(frozen=True, slots=True)
class _Region:
    """Adjacent tensors that are computed alike, from number `first` on: `units` bytes if copied, else elements."""

    first: int
    units: int
    kind: _Kind


class _Source:
    """One stored file, read sequentially."""

    def __init__(self, part: Part, share: float) -> None:
        self.path: Path = part.snapshot.folder / part.member.file.name
        self.share = share
        self.stored = read_header(self.path)
        self._sha256 = part.member.file.sha256
        self._digest = hashlib.sha256()
        self._position = 0
        self.read(self.stored[0].offset if self.stored else part.member.file.size)

    def read(self, nbytes: int) -> bytearray:
        piece = bytearray(nbytes)
        with self.path.open("rb") as file:  # not kept open: there may be more parts than the limit of open files
            file.seek(self._position)
            file.readinto(piece)
        self._digest.update(piece)
        self._position += nbytes
        return piece

    def units(self, region: _Region, count: int) -> torch.Tensor:
        """The next `count` elements, of a region that is not copied."""
        dtype = self.stored[region.first].dtype
        return torch.frombuffer(self.read(count * ITEM_BYTES[dtype]), dtype=TORCH_DTYPES[dtype])

    def check(self) -> None:
        found = self._digest.hexdigest()
        if found != self._sha256:
            raise BrokenGeneration(f"{self.path} has sha256 {found} instead of {self._sha256}")


def combined(plan: Plan) -> Iterator[Piece]:
    """The bytes of the model file that the plan describes.

    Raises:
        BrokenGeneration: a file has another sha256 than recorded.
        BadModelFile: the files do not hold the same tensors.
        OSError: the disk fails, or a snapshot was dropped from the ring meanwhile.
    """
    newest, *others = sources = _sources(plan)
    if any([one.name for one in other.stored] != [one.name for one in newest.stored] for other in others):
        raise BadModelFile(f"the files to be added up hold other tensors than {newest.path}")
    header, _ = describe((one.name, "F32" if one.dtype == "BF16" else one.dtype, one.shape) for one in newest.stored)
    yield header
    for region in _regions(newest.stored, plan.newest.member.copied):
        for begin in range(0, region.units, _CHUNK_ELEMENTS):
            count = min(_CHUNK_ELEMENTS, region.units - begin)
            yield _copy(sources, count) if region.kind is _Kind.COPIED else _sum(sources, region, count)
    for source in sources:
        source.check()


def _sources(plan: Plan) -> list[_Source]:
    """The newest part first, even if its share is 0."""
    shares = {_key(part): part.share for part in plan.parts}
    newest = _Source(plan.newest, shares.get(_key(plan.newest), 0.0))
    return [newest, *(_Source(part, part.share) for part in plan.parts if _key(part) != _key(plan.newest))]


def _key(part: Part) -> tuple[int, str]:
    return part.snapshot.step, part.member.average


def _regions(stored: Sequence[Stored], copied: frozenset[str]) -> Iterator[_Region]:
    def kind_of(number: int) -> _Kind:
        name = stored[number].name
        if stored[number].dtype not in _FLOATS or name in copied:
            return _Kind.COPIED
        return _Kind.VARIANCE if name.rpartition(".")[2] == _VARIANCE else _Kind.SUMMED

    for kind, group in groupby(range(len(stored)), key=kind_of):
        numbers = list(group)
        sizes = [stored[number].nbytes if kind is _Kind.COPIED else stored[number].elements for number in numbers]
        yield _Region(numbers[0], sum(sizes), kind)


def _sum(sources: Sequence[_Source], region: _Region, count: int) -> memoryview:
    total, smallest = torch.zeros(count, dtype=torch.float64), None
    for source in sources:
        values = source.units(region, count).double()  # mixed dtypes take three times as long
        total.add_(values, alpha=source.share)
        if region.kind is _Kind.VARIANCE:
            smallest = values if smallest is None else torch.minimum(smallest, values)
    if smallest is not None:
        total = torch.maximum(total, smallest)
    rounded = bytearray(count * ITEM_BYTES["F32"])
    torch.frombuffer(rounded, dtype=torch.float32).copy_(total)
    return memoryview(rounded)


def _copy(sources: Sequence[_Source], nbytes: int) -> bytearray:
    pieces = [source.read(nbytes) for source in sources]  # of all sources: whole files are verified
    return pieces[0]
