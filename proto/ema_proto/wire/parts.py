"""Parts: which of the tensors of its manifest a rank sends, packed by the layout rule, and how JOINED says so."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ema_proto.errors import LocalProtocolError
from ema_proto.wire.manifest import Manifest, TensorSpec, placed


@dataclass(frozen=True)
class Part:
    """What one rank sends of each snapshot.

    `indices` are those of its manifest's tensors, ascending; `tensors` are these with their offsets in the part, which
    has `nbytes` bytes.
    """

    indices: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    nbytes: int


def part_of(manifest: Manifest, indices: Sequence[int]) -> Part:
    """The part that holds these tensors of a rank's manifest."""
    if not indices:
        return Part((), (), 0)
    if len(indices) == len(manifest.tensors):
        return Part(tuple(indices), manifest.tensors, manifest.nbytes)
    tensors = placed([manifest.tensors[index] for index in indices])  # checked with the manifest: ranks have many
    return Part(tuple(indices), tensors, sum(tensor.nbytes for tensor in tensors))


def to_ranges(indices: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending indices as ranges, each with its first and last index."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = ranges[-1][0], index
        else:
            ranges.append((index, index))
    return tuple(ranges)


def from_ranges(ranges: Iterable[tuple[int, int]], count: int) -> tuple[int, ...]:
    """The indices of ranges.

    Raises:
        LocalProtocolError: they are not ascending, or not below `count`.
    """
    indices = tuple(index for first, last in ranges for index in range(first, last + 1))
    if any(one >= other for one, other in itertools.pairwise((-1, *indices, count))):
        raise LocalProtocolError(f"the server asks for tensors {list(ranges)[:4]} of {count}, not in ascending order")
    return indices
