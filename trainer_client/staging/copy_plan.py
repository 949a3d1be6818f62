"""Which way each tensor takes from a device into the slot, decided once for a manifest.

Small tensors are gathered in a scratch on the device, and each span of it is one copy; the others are copied from where
they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ema_proto.wire.manifest import Manifest, Role, TensorSpec

# With the bounce buffer (see `overlapped`) 64 MiB, the most that we take of a trainer's GPU memory.
SCRATCH_BYTES = 48 << 20
SMALL_BYTES = 256 << 10  # a copy of its own costs as much as transferring this many bytes
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
        on_compute: buffers for which the scratch has no room: copied before forward can change them.
        on_side: parameters, which do not change until the next step.
    """

    gathered: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    on_compute: tuple[int, ...]
    on_side: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest, scratch_bytes: int = SCRATCH_BYTES, small_bytes: int = SMALL_BYTES) -> CopyPlan:
        """Gather what fits: first the buffers, smallest first, then the parameters of at most `small_bytes`."""
        numbered = [(index, spec) for index, spec in enumerate(manifest.tensors) if spec.nbytes]
        buffers = [item for item in numbered if _is_buffer(item[1])]
        small = [item for item in numbered if not _is_buffer(item[1]) and item[1].nbytes <= small_bytes]
        chosen = _fitting([*sorted(buffers, key=lambda item: item[1].nbytes), *small], scratch_bytes)
        gathered, spans = _packed([item for item in numbered if item[0] in chosen])
        rest = [item for item in numbered if item[0] not in chosen]
        return cls(
            gathered,
            spans,
            tuple(index for index, spec in rest if _is_buffer(spec)),
            tuple(index for index, spec in rest if not _is_buffer(spec)),
        )

    @property
    def scratch_bytes(self) -> int:
        return max((span.scratch + span.nbytes for span in self.spans), default=0)


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


def _packed(items: list[tuple[int, TensorSpec]]) -> tuple[tuple[tuple[int, int], ...], tuple[Span, ...]]:
    """Make tensors that are neighbours in the slot neighbours in the scratch too."""
    gathered: list[tuple[int, int]] = []
    spans: list[Span] = []
    for index, spec in sorted(items, key=lambda item: item[1].offset):
        last = spans[-1] if spans else None
        if last is not None and last.slot + last.nbytes == spec.offset:
            gathered.append((index, last.scratch + last.nbytes))
            spans[-1] = Span(last.scratch, last.slot, last.nbytes + spec.nbytes)
            continue
        start = 0 if last is None else -(-(last.scratch + last.nbytes) // _ALIGNMENT) * _ALIGNMENT
        gathered.append((index, start))
        spans.append(Span(start, spec.offset, spec.nbytes))
    return tuple(gathered), tuple(spans)
