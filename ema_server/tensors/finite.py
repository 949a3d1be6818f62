"""Finds NaN and Inf in the tensors of a snapshot that can be averaged, piece by piece, at the speed of memory."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.wire.manifest import Manifest, TensorSpec
from ema_server.tensors.dtypes import view
from ema_server.tensors.selection import can_be_averaged


def is_finite(values: torch.Tensor) -> bool:
    """Whether a float tensor has neither NaN nor Inf."""
    # NaN or Inf always makes the sum NaN or Inf, and summing runs at the speed of memory (half floats are summed in
    # float32). The sum of finite values may overflow too: then the extremes decide, at half the speed.
    if math.isfinite(values.sum().item()):
        return True
    lowest, highest = torch.aminmax(values)
    return math.isfinite(lowest.item()) and math.isfinite(highest.item())


@dataclass(frozen=True, slots=True)
class _Run:
    """Tensors of one dtype that can be averaged, contiguous in the snapshot; `begins` has their offsets."""

    dtype: str
    begin: int
    end: int
    tensors: tuple[TensorSpec, ...]
    begins: tuple[int, ...]


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

    def check(self, offset: int, data: torch.Tensor) -> tuple[str, ...]:
        """Names of the checked tensors with NaN or Inf in these bytes of the snapshot.

        Args:
            offset: the first byte, a multiple of 8.
            data: uint8, 1-D; its length is a multiple of 8 unless it ends with the snapshot.
        """
        end = offset + len(data)
        found: list[str] = []
        for run in self._runs[max(bisect_right(self._begins, offset) - 1, 0) :]:
            if run.begin >= end:
                break
            first, last = max(offset, run.begin), min(end, run.end)
            if first < last and not is_finite(_elements(data, run.dtype, first - offset, last - offset)):
                found.extend(_not_finite(run, first, last, data, offset))
        return tuple(found)


def _not_finite(run: _Run, first: int, last: int, data: torch.Tensor, offset: int) -> Iterator[str]:
    for tensor in run.tensors[bisect_right(run.begins, first) - 1 :]:
        begin, end = max(first, tensor.offset), min(last, tensor.end)
        if begin >= end:
            return
        if not is_finite(_elements(data, run.dtype, begin - offset, end - offset)):
            yield tensor.name


def _elements(data: torch.Tensor, dtype: str, begin: int, end: int) -> torch.Tensor:
    return view(data, dtype, begin, (end - begin) // ITEM_BYTES[dtype])


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
    begins = tuple(tensor.offset for tensor in group)
    return _Run(group[0].dtype, group[0].offset, group[-1].end, tuple(group), begins)
