"""Host memory that snapshots travel in. Slots are made once, exactly one snapshot long, and never resized.

Anonymous mappings rather than an allocator's blocks: their size is exact, their pages are returned when the last view
goes, and a `memoryview` of one can be sent without a copy.
"""

from __future__ import annotations

import mmap

import torch


class Slot:
    """One slot: `index` in the ring, its bytes as a tensor (uint8, 1-D) and as a memoryview of the same memory."""

    __slots__ = ("index", "tensor", "view")

    def __init__(self, index: int, nbytes: int) -> None:
        memory = mmap.mmap(-1, nbytes)
        self.index = index
        # Filled once, so that its pages are there before the first snapshot: mapping them costs as much as copying.
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8).zero_()
        # A memoryview holds the mapping's export: it cannot be unmapped while a frame of it is in flight.
        self.view = memoryview(memory)


def make_slots(nbytes: int, count: int) -> tuple[Slot, ...]:
    """`count` slots of `nbytes` bytes each."""
    return tuple(Slot(index, nbytes) for index in range(count))
