"""Finds NaN and Inf in the tensors of a snapshot that can be averaged, chunk by chunk, while each chunk is in cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.wire.manifest import Manifest, TensorSpec
from ema_server.compute.memory import allocate
from ema_server.tensors.dtypes import view
from ema_server.tensors.finite import is_finite
from ema_server.tensors.selection import can_be_averaged


@dataclass(frozen=True, slots=True)
class _Run:
    """Tensors of one dtype that can be averaged, contiguous in the snapshot."""

    dtype: str
    begin: int
    end: int
    tensors: tuple[TensorSpec, ...]


class Slot:
    """Host memory of one snapshot's length, and the tensors that arrived in it with NaN or Inf.

    Pages are mapped as the first snapshot arrives: touching them all when a run joins would delay other runs'
    snapshots.

    Raises:
        MemoryError: the system has not enough memory.
    """

    __slots__ = ("_attempt", "not_finite", "tensor", "view")

    def __init__(self, nbytes: int) -> None:
        memory = allocate(nbytes)
        self.tensor, self.view = memory.data, memory.view  # the same bytes: uint8, 1-D
        self.not_finite: set[str] = set()
        self._attempt = 0

    def note(self, attempt: int, not_finite: tuple[str, ...]) -> None:
        """Record which tensors of a chunk of this attempt have NaN or Inf. Another attempt starts empty."""
        if attempt != self._attempt:
            self._attempt = attempt
            self.not_finite.clear()
        self.not_finite.update(not_finite)


class FiniteCheck:
    """The check for one manifest. Immutable. `exempt` names tensors that are not averaged in this run, nor checked."""

    def __init__(self, manifest: Manifest, exempt: frozenset[str] = frozenset()) -> None:
        self._manifest = manifest
        self._exempt = exempt
        self._runs = tuple(_runs(manifest, exempt))
        self._begins = [run.begin for run in self._runs]

    def exempt(self, names: Iterable[str]) -> FiniteCheck:
        """The same check without these tensors."""
        exempt = self._exempt | frozenset(names)
        return self if exempt == self._exempt else FiniteCheck(self._manifest, exempt)

    def check(self, offset: int, length: int, slot: torch.Tensor) -> tuple[str, ...]:
        """Names of the checked tensors with NaN or Inf in bytes `offset` to `offset + length`.

        Args:
            offset: first byte, a multiple of 8.
            length: bytes, a multiple of 8 unless the range ends with the snapshot.
            slot: the whole snapshot, uint8, 1-D.
        """
        end = offset + length
        found: list[str] = []
        for run in self._runs[max(bisect_right(self._begins, offset) - 1, 0) :]:
            if run.begin >= end:
                break
            first, last = max(offset, run.begin), min(end, run.end)
            if first < last and not is_finite(_elements(slot, run.dtype, first, last)):
                found.extend(_not_finite(run, first, last, slot))
        return tuple(found)


def _not_finite(run: _Run, first: int, last: int, slot: torch.Tensor) -> Iterator[str]:
    for tensor in run.tensors:
        begin, end = max(first, tensor.offset), min(last, tensor.end)
        if begin < end and not is_finite(_elements(slot, run.dtype, begin, end)):
            yield tensor.name


def _elements(slot: torch.Tensor, dtype: str, begin: int, end: int) -> torch.Tensor:
    return view(slot, dtype, begin, (end - begin) // ITEM_BYTES[dtype])


def _runs(manifest: Manifest, exempt: frozenset[str]) -> Iterator[_Run]:
    group: list[TensorSpec] = []
    for tensor in manifest.by_offset:
        if not tensor.nbytes or not can_be_averaged(tensor, exempt):
            continue
        if group and (group[-1].dtype != tensor.dtype or group[-1].end != tensor.offset):
            yield _run(group)
            group = []
        group.append(tensor)
    if group:
        yield _run(group)


def _run(group: list[TensorSpec]) -> _Run:
    return _Run(group[0].dtype, group[0].offset, group[-1].end, tuple(group))
