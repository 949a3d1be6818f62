"""The manifests of all ranks become the manifest of the run, and each box is dealt to one of its holders.

Hundreds of ranks have hundreds of thousands of boxes together: they are merged in pieces, between which others are
served.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.wire.boxes import Box, tiling_fault, whole
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.wire.parts import Part, part_of

_Span: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a box
_Holder: TypeAlias = tuple[int, int]  # a rank, and the index in its list


@dataclass(frozen=True)
class Merged:
    """The manifest of the run, without boxes, and the part of each rank."""

    manifest: Manifest
    parts: tuple[Part, ...]


@dataclass(slots=True)
class _Held:
    """One tensor as the rank `first` describes it: the lowest holder of each box, and the others if there are any."""

    first: int
    tensor: TensorSpec
    holders: dict[_Span, _Holder] = field(default_factory=dict)
    others: dict[_Span, list[_Holder]] = field(default_factory=dict)

    def add(self, span: _Span, holder: _Holder) -> None:
        # A list for each box of each tensor would keep the garbage collector busy: few boxes have several holders.
        if self.holders.setdefault(span, holder) is not holder:
            self.others.setdefault(span, []).append(holder)


class Merging:
    """Merges the manifests of ranks 0, 1, … of one trainer, in pieces.

    A box that several ranks hold is sent by one of them: that of a buffer by the lowest rank, since buffers may differ
    between ranks and one rank's belong together, and others so that all ranks send about as many bytes.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifests = manifests
        self._held: dict[str, _Held] = {}
        self._sent: list[list[int]] = [[] for _ in manifests]  # of each rank: indices into its list
        self._pieces = self._merge()

    def advance(self, boxes: int) -> Merged | None:
        """Merge about this many boxes more; returns the result once it is complete.

        Raises:
            RemoteProtocolError: `ranks_differ`, two ranks describe a tensor differently; `not_tiled`, the boxes of a
                tensor overlap or leave a hole; `manifest_invalid`, there is nothing to send.
        """
        while boxes > 0:
            try:
                boxes -= next(self._pieces)
            except StopIteration as end:
                merged: Merged = end.value
                return merged
        return None

    def _merge(self) -> Generator[int, None, Merged]:
        """Yields how many boxes each piece has had."""
        yield from self._collect()
        for name, held in self._held.items():
            fault = tiling_fault(held.tensor.shape, [Box(*span) for span in held.holders])
            if fault is not None:
                raise RemoteProtocolError(RejectCode.NOT_TILED, f"tensor {name!r} {list(held.tensor.shape)}: {fault}")
            yield len(held.holders)
        names = yield from self._order()
        try:
            manifest = layout(replace(self._held[name].tensor, box=None) for name in names)
        except LocalProtocolError as error:
            text = f"the tensors of all ranks together: {error}"
            raise RemoteProtocolError(RejectCode.MANIFEST_INVALID, text) from None
        yield len(names)
        yield from self._deal(manifest)
        parts = []
        for rank, indices in zip(self._manifests, self._sent, strict=True):
            parts.append(part_of(rank, sorted(indices)))
            yield len(rank.tensors)
        return Merged(manifest, tuple(parts))

    def _collect(self) -> Iterator[int]:
        for rank, manifest in enumerate(self._manifests):
            for index, tensor in enumerate(manifest.tensors):
                held = self._held.get(tensor.name)
                if held is None:
                    held = self._held[tensor.name] = _Held(rank, tensor)
                _check_alike(held.first, held.tensor, rank, tensor)
                box = whole(tensor.shape) if tensor.box is None else tensor.box
                if 0 not in box.sizes:
                    held.add((box.offsets, box.sizes), (rank, index))
            yield len(manifest.tensors)

    def _order(self) -> Generator[int, None, list[str]]:
        """All names in an order that agrees with each rank's: a name that is new comes before the next known one."""
        merged: list[str] = []
        known: set[str] = set()
        before: list[str] = []
        for manifest in self._manifests:
            names = [tensor.name for tensor in manifest.tensors]
            if names != before:
                merged = _inserted(merged, known, names)
                known.update(names)
            before = names
            yield len(names)
        return merged

    def _deal(self, manifest: Manifest) -> Iterator[int]:
        """Choose the rank that sends each box; of those that several ranks hold, large ones first."""
        load = [0] * len(self._manifests)
        shared: defaultdict[int, list[list[_Holder]]] = defaultdict(list)
        for tensor in manifest.tensors:
            is_state = tensor.role in (Role.BUFFER, Role.STRUCTURAL)
            held, item = self._held[tensor.name], ITEM_BYTES[tensor.dtype]
            for span, (rank, index) in held.holders.items():
                nbytes = math.prod(span[1]) * item
                if span in held.others:
                    shared[nbytes].append([(rank, index), *(() if is_state else held.others[span])])
                else:
                    load[rank] += nbytes
                    self._sent[rank].append(index)
            yield len(held.holders)
        for nbytes in sorted(shared, reverse=True):
            for ranks in shared[nbytes]:
                rank, index = min(ranks, key=lambda each: load[each[0]])
                load[rank] += nbytes
                self._sent[rank].append(index)
                yield len(ranks)


def _check_alike(first: int, described: TensorSpec, rank: int, tensor: TensorSpec) -> None:
    for what in ("dtype", "shape", "role", "aliases"):
        one, other = getattr(described, what), getattr(tensor, what)
        if one != other:
            text = f"tensor {tensor.name!r} has {what} {_text(one)} on rank {first} and {_text(other)} on rank {rank}"
            raise RemoteProtocolError(RejectCode.RANKS_DIFFER, text)


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _inserted(merged: list[str], known: set[str], names: Sequence[str]) -> list[str]:
    """The names of lower ranks, with those of one more rank: new ones come before the next known one."""
    before: dict[str, list[str]] = {}
    new: list[str] = []
    for name in names:
        if name not in known:
            new.append(name)
        elif new:
            before[name], new = new, []
    if before:
        merged = [each for name in merged for each in (*before.get(name, ()), name)]
    return merged + new
