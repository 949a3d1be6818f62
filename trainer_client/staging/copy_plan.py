"""Which way each tensor takes from a device into the slot, decided once for a manifest.

Comes in: a manifest and two sizes. Goes out: the tensors that are gathered in a scratch of the device, which spans of
the scratch are then one copy each, and what is copied from where it lies. Knows no memory, no streams and no strides:
those are looked at in each snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ema_proto.wire.manifest import Manifest, Role, TensorSpec

# With the bounce (see `overlap`) 64 MiB, in the units of torch's allocator: what a trainer's GPU memory pays at most.
SCRATCH_BYTES = 48 << 20
SMALL_BYTES = 256 << 10  # a copy of its own costs as much as transferring so many bytes
_ALIGNED = 64  # a span begins where wide loads can begin, whatever lies before it


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that lie together in the scratch and in the slot."""

    scratch: int
    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Indices into the manifest's tensors; empty tensors are in none.

    Attributes:
        gathered: buffers and small parameters, with the first byte of each in the scratch.
        spans: what is copied from the scratch to the slot.
        on_compute: buffers for which the scratch has no room: copied before forward can change them.
        on_side: parameters, which stay as they are until the next step.
    """

    gathered: tuple[tuple[int, int], ...]
    spans: tuple[Span, ...]
    on_compute: tuple[int, ...]
    on_side: tuple[int, ...]

    @property
    def scratch_bytes(self) -> int:
        """Length of the scratch."""
        return max((span.scratch + span.nbytes for span in self.spans), default=0)


def plan_routes(manifest: Manifest, scratch_bytes: int = SCRATCH_BYTES, small_bytes: int = SMALL_BYTES) -> CopyPlan:
    """Gather what fits: first the buffers, from the smallest up, then the parameters of at most `small_bytes`."""
    numbered = [(index, spec) for index, spec in enumerate(manifest.tensors) if spec.nbytes]
    buffers = [item for item in numbered if _is_buffer(item[1])]
    small = [item for item in numbered if not _is_buffer(item[1]) and item[1].nbytes <= small_bytes]
    chosen = _fitting([*sorted(buffers, key=lambda item: item[1].nbytes), *small], scratch_bytes)
    gathered, spans = _placed([item for item in numbered if item[0] in chosen])
    rest = [item for item in numbered if item[0] not in chosen]
    return CopyPlan(
        gathered,
        spans,
        tuple(index for index, spec in rest if _is_buffer(spec)),
        tuple(index for index, spec in rest if not _is_buffer(spec)),
    )


def pieces(tensor: Tensor, nbytes_max: int) -> Iterator[Tensor]:
    """Views that together are `tensor` in row-major order, each of at most `nbytes_max` bytes."""
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
        taken = spec.nbytes + _ALIGNED  # as if each began a span of its own
        if taken <= room:
            chosen.append(index)
            room -= taken
    return frozenset(chosen)


def _placed(items: list[tuple[int, TensorSpec]]) -> tuple[tuple[tuple[int, int], ...], tuple[Span, ...]]:
    """Put neighbours of the slot side by side in the scratch."""
    gathered: list[tuple[int, int]] = []
    spans: list[Span] = []
    for index, spec in sorted(items, key=lambda item: item[1].offset):
        last = spans[-1] if spans else None
        if last is not None and last.slot + last.nbytes == spec.offset:
            gathered.append((index, last.scratch + last.nbytes))
            spans[-1] = Span(last.scratch, last.slot, last.nbytes + spec.nbytes)
            continue
        start = 0 if last is None else -(-(last.scratch + last.nbytes) // _ALIGNED) * _ALIGNED
        gathered.append((index, start))
        spans.append(Span(start, spec.offset, spec.nbytes))
    return tuple(gathered), tuple(spans)
