"""Which way each tensor takes from a device into the slot, decided once for a manifest.

Small tensors are gathered in a scratch on the device. Each long span of it is one copy; all short spans are one copy to
the host, which brings them to their places. The other tensors are copied from where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from ema_proto.wire.manifest import Manifest, Role, TensorSpec

# With the bounce buffer (see `overlapped`) 64 MiB, the most that we take of a trainer's GPU memory.
SCRATCH_BYTES = 48 << 20
SMALL_BYTES = 256 << 10  # a copy of its own costs as much as transferring this many bytes
SCATTERED_BYTES = 8 << 20  # the most that the host brings to its places
_ALIGNMENT = 64  # spans begin where wide loads can begin


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that are contiguous both in the scratch and in the slot: their offsets there, and their number."""

    scratch: int
    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Indices into the manifest's tensors; empty tensors are in none.

    Attributes:
        gathered: buffers and small parameters, with the offset of each in the scratch.
        spans: what is copied from the scratch to the slot.
        scattered: what is copied with all between from the beginning of the scratch to the host, and from there to the
            slot: fewer calls of the training thread, as in most models weights lie between small tensors.
        on_compute: buffers for which the scratch has no room: copied before forward can change them.
        on_side: parameters, which do not change until the next step.
    """

    gathered: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    scattered: tuple[Span, ...]
    on_compute: tuple[int, ...]
    on_side: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest, scratch_bytes: int = SCRATCH_BYTES, small_bytes: int = SMALL_BYTES) -> CopyPlan:
        """Gather what fits: first the buffers, smallest first, then the parameters of at most `small_bytes`."""
        numbered = [(index, spec) for index, spec in enumerate(manifest.tensors) if spec.nbytes]
        buffers = [item for item in numbered if _is_buffer(item[1])]
        small = [item for item in numbered if not _is_buffer(item[1]) and item[1].nbytes <= small_bytes]
        chosen = _fitting([*sorted(buffers, key=lambda item: item[1].nbytes), *small], scratch_bytes)
        gathered, spans, scattered = _packed([item for item in numbered if item[0] in chosen])
        rest = [item for item in numbered if item[0] not in chosen]
        return cls(
            gathered,
            spans,
            scattered,
            tuple(index for index, spec in rest if _is_buffer(spec)),
            tuple(index for index, spec in rest if not _is_buffer(spec)),
        )

    @property
    def scratch_bytes(self) -> int:
        return max((span.scratch + span.nbytes for span in (*self.spans, *self.scattered)), default=0)

    @property
    def scattered_bytes(self) -> int:
        return max((span.scratch + span.nbytes for span in self.scattered), default=0)


def pieces(tensor: Tensor, nbytes_max: int) -> Iterator[Tensor]:
    """Split `tensor` into views in row-major order, each of at most `nbytes_max` bytes."""
    if tensor.nbytes <= nbytes_max or tensor.dim() == 0:
        yield tensor
        return
    row_bytes = tensor.nbytes // len(tensor)
    if row_bytes <= nbytes_max:
        yield from tensor.split(nbytes_max // row_bytes)
        return
    for row in tensor.unbind():
        yield from pieces(row, nbytes_max)


def _is_buffer(spec: TensorSpec) -> bool:
    return spec.role in (Role.BUFFER, Role.STRUCTURAL)


def _fitting(candidates: Iterable[tuple[int, TensorSpec]], room: int) -> frozenset[int]:
    chosen = []
    for index, spec in candidates:
        taken = spec.nbytes + _ALIGNMENT  # the most that alignment can cost
        if taken <= room:
            chosen.append(index)
            room -= taken
    return frozenset(chosen)


_Item: TypeAlias = tuple[int, TensorSpec]
_Places: TypeAlias = tuple[tuple[tuple[int, int], ...], tuple[Span, ...], tuple[Span, ...]]


def _packed(items: list[_Item]) -> _Places:
    """Make tensors that are neighbours in the slot neighbours in the scratch too, and short spans of them the first."""
    runs = list(_runs(items))
    scattered = _scattered([sum(spec.nbytes for _, spec in run) for run in runs])
    gathered: list[tuple[int, int]] = []
    spans: tuple[list[Span], list[Span]] = ([], [])
    end = 0
    for number in [*scattered, *(number for number in range(len(runs)) if number not in scattered)]:
        begin = end = -(-end // _ALIGNMENT) * _ALIGNMENT
        for index, spec in runs[number]:
            gathered.append((index, end))
            end += spec.nbytes
        spans[number in scattered].append(Span(begin, runs[number][0][1].offset, end - begin))
    return tuple(gathered), tuple(spans[False]), tuple(spans[True])


def _runs(items: list[_Item]) -> Iterator[list[_Item]]:
    """The items by rising offset, those without a gap between them together."""
    run: list[_Item] = []
    for item in sorted(items, key=lambda item: item[1].offset):
        if run and run[-1][1].end != item[1].offset:
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _scattered(sizes: Sequence[int]) -> dict[int, None]:
    """Which runs, of these sizes, the host brings to their places, in order: the shortest; none if it is only one."""
    chosen, room = list[int](), SCATTERED_BYTES
    for number in sorted(range(len(sizes)), key=lambda number: sizes[number]):
        room -= sizes[number] + _ALIGNMENT
        if sizes[number] > SMALL_BYTES or room < 0:
            break
        chosen.append(number)
    return dict.fromkeys(sorted(chosen) if len(chosen) > 1 else ())
