"""Where the snapshots of one trainer are assembled: its slots, and the way from each rank's chunks into them.

The chunks of a trainer that is not sharded have the layout of the slot, and are received straight into it. The part of
a rank has its own layout: a chunk that lies in one stretch of the slot is received there, others in a buffer from which
they are copied to their places while they are in cache. A snapshot in shared memory is read where it is, and parts of
ranks are copied from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.receiver import events as e
from ema_proto.wire.boxes import pieces, whole
from ema_proto.wire.manifest import Manifest, TensorSpec
from ema_proto.wire.parts import Part
from ema_server.compute.memory import HostMemory, allocate
from ema_server.ingest.local_socket import SharedSlots
from ema_server.tensors.finite import FiniteCheck

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # copied as bits, whatever the dtype


@dataclass(frozen=True, slots=True)
class Place:
    """Where to receive a chunk: `view`, whose bytes are `data`, and what to copy to where afterwards."""

    view: memoryview
    data: torch.Tensor
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


class Slot:
    """Host memory of one snapshot's length, and the tensors that arrived in it with NaN or Inf.

    Pages are mapped as the first snapshot arrives: touching them all when a run joins would delay other runs'
    snapshots.

    Raises:
        MemoryError: the system has not enough memory.
    """

    __slots__ = ("_not_finite", "tensor", "view")

    def __init__(self, nbytes: int) -> None:
        memory = allocate(nbytes)
        self.tensor, self.view = memory.data, memory.view  # the same bytes: uint8, 1-D
        self._not_finite: dict[int, tuple[int, set[str]]] = {}  # by rank: the attempt, and the tensors

    def note(self, rank: int, attempt: int, not_finite: Iterable[str]) -> None:
        """Record which tensors of a chunk of this attempt of a rank have NaN or Inf. Another attempt starts empty."""
        known, names = self._not_finite.get(rank, (0, set()))
        if attempt != known:
            names = set()
            self._not_finite[rank] = attempt, names
        names.update(not_finite)

    @property
    def not_finite(self) -> tuple[str, ...]:
        """The tensors with NaN or Inf in the part of any rank, sorted."""
        return tuple(sorted(set().union(*(names for _, names in self._not_finite.values()))))


class Staging:
    """The slots of one trainer. They live until the averager has answered its last snapshot.

    Args:
        run: its name.
        manifest: the run's own.
        parts: what each rank sends.
        exempt: tensors that need no finite check.
        slots: their number.
        buffer: at least as long as a chunk; it may be shared by all trainers, since one chunk is received at a time.
        shared: the slots of the ranks whose parts lie in their own memory; the other parts come in chunks.

    Raises:
        MemoryError: the system has not enough memory for the slots.
    """

    def __init__(
        self,
        run: str,
        manifest: Manifest,
        parts: tuple[Part, ...],
        exempt: frozenset[str],
        slots: int,
        buffer: HostMemory,
        shared: Mapping[int, SharedSlots] = MappingProxyType({}),
    ) -> None:
        self.run = run
        self.shared = shared
        self.snapshot_nbytes = manifest.nbytes
        self.reads_in_place = len(parts) == 1 and 0 in shared and _places(parts[0].tensors) == _places(manifest.tensors)
        self.slots = () if self.reads_in_place else tuple(Slot(manifest.nbytes) for _ in range(slots))
        self._checks: dict[int, FiniteCheck] = {}  # by rank; made when needed, since ranks may be many
        self._exempt = exempt
        self._parts = parts
        self._buffer = buffer
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._is_direct = len(parts) == 1 and parts[0].tensors == manifest.tensors
        self._places: dict[tuple[int, int, int], Place] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the server's own."""
        return sum(len(slot.view) for slot in self.slots)

    @property
    def shared_nbytes(self) -> int:
        """Memory of the trainer that is read in place."""
        return sum(slots.nbytes * len(slots.tensors) for slots in self.shared.values())

    def place(self, target: e.Payload) -> Place:
        """Where to receive this chunk."""
        if self._is_direct:
            slot, end = self.slots[target.slot], target.offset + target.length
            return Place(slot.view[target.offset : end], slot.tensor[target.offset : end])
        key = target.rank, target.slot, target.offset
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = self._find(target)
        return place

    def received(self, target: e.Payload, place: Place) -> None:
        """The chunk is in its place: check it, and copy it into the slot."""
        not_finite = self._check_of(target.rank).check(target.offset, place.data)
        self.slots[target.slot].note(target.rank, target.attempt, not_finite)
        for there, here in place.copies:
            there.copy_(here)

    def copy(self, rank: int, slot: int, source: int) -> None:
        """Copy the part of a rank from its shared slot `source` to its places in `slot`. Any thread may call it."""
        part = self._parts[rank]
        data = self.shared[rank].tensors[source][: part.nbytes]
        for there, here in self._copies(self.slots[slot], part, 0, data):
            there.copy_(here)

    def exempt(self, names: Iterable[str]) -> None:
        """Do not check these tensors from now on."""
        exempt = self._exempt | frozenset(names)
        if exempt != self._exempt:
            self._exempt = exempt
            self._checks.clear()

    def _check_of(self, rank: int) -> FiniteCheck:
        check = self._checks.get(rank)
        if check is None:
            check = self._checks[rank] = FiniteCheck(Manifest(self._parts[rank].tensors), self._exempt)
        return check

    def _find(self, target: e.Payload) -> Place:
        data = self._buffer.data[: target.length]
        slot = self.slots[target.slot]
        copies = tuple(self._copies(slot, self._parts[target.rank], target.offset, data))
        if len(copies) == 1 and copies[0][0].is_contiguous():
            there, _ = copies[0]
            begin = there.storage_offset() * there.element_size()
            end = begin + target.length
            return Place(slot.view[begin:end], slot.tensor[begin:end])
        return Place(self._buffer.view[: target.length], data, copies)

    def _copies(
        self, slot: Slot, part: Part, offset: int, data: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Places in the slot, and the bytes of `data`, the part from `offset`, that belong there."""
        end = offset + len(data)
        for tensor in part.tensors:
            first, last = max(offset, tensor.offset), min(end, tensor.end)
            if first >= last:
                continue
            size = ITEM_BYTES[tensor.dtype]
            items = data[first - offset : last - offset].view(_INTEGERS[size])
            yield from _pairs(self._elements(slot, tensor), tensor, (first - tensor.offset) // size, items)

    def _elements(self, slot: Slot, tensor: TensorSpec) -> torch.Tensor:
        """The whole tensor in the slot."""
        known = self._tensors[tensor.name]
        dtype = _INTEGERS[ITEM_BYTES[known.dtype]]
        return slot.tensor[known.offset : known.end].view(dtype).view(known.shape)


def _places(tensors: Iterable[TensorSpec]) -> set[tuple[str, int]]:
    """Where tensors are in a snapshot. A trainer's may be in another order than those of its run."""
    return {(tensor.name, tensor.offset) for tensor in tensors}


def _pairs(
    there: torch.Tensor, tensor: TensorSpec, start: int, items: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the items of a box, from its element `start`, into pieces that lie in `there` as rectangles."""
    box = tensor.box or whole(tensor.shape)
    position = 0
    for piece in pieces(box.sizes, start, start + len(items)):
        target = there
        for dimension, (low, inner, size) in enumerate(zip(box.offsets, piece.offsets, piece.sizes, strict=True)):
            target = target.narrow(dimension, low + inner, size)
        yield target, items[position : position + piece.elements].view(piece.sizes)
        position += piece.elements
