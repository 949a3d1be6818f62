"""The host memory that snapshots are copied into. Slots are made once, exactly one snapshot long, and never resized.

They are the same for the whole session, whatever connections and servers it has: views and locks of them stay valid.
Mappings rather than an allocator's blocks: their size is exact, their pages are returned when the last view
goes, and a `memoryview` of one can be sent without a copy.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from trainer_client.staging.device import Device
from trainer_client.staging.shared_memory import make_present, map_shared

log = logging.getLogger("ema")

# Huge pages make the copy faster. Without DONTFORK, each write to a slot after a fork would first copy a page, and a
# device would go on writing to the old one.
_ADVICE: Final = ("MADV_HUGEPAGE", "MADV_DONTFORK")

_private: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # the memory of slots that are not shared

# Locked memory must not be returned to the system: what could not be unlocked is kept until the process ends.
_kept: list[Tensor] = []


class Slot:
    """One slot: its `index`, its bytes as a tensor (uint8, 1-D) and as a memoryview of the same memory.

    `descriptor` is that of the file behind shared memory, by which the server maps it too; None if it is private.
    """

    __slots__ = ("_memory", "descriptor", "index", "tensor", "view")

    def __init__(
        self, index: int, memory: mmap.mmap | ctypes.Array[ctypes.c_char], nbytes: int, descriptor: int | None = None
    ) -> None:
        self._memory = memory
        self.index = index
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
        # A memoryview holds the mapping's export: it cannot be unmapped while a frame of it is being sent.
        self.view = memoryview(memory).cast("B")[:nbytes]
        self.descriptor = descriptor

    def first(self, nbytes: int) -> Slot:
        """The first `nbytes` of this slot."""
        return Slot(self.index, self._memory, nbytes, self.descriptor)


def make_slots(nbytes: int, count: int, *, shared: bool = False) -> tuple[Slot, ...]:
    """`count` slots of `nbytes` bytes each, of memory that can be `shared` with a server on the same machine.

    Their pages are present before the first snapshot: mapping them costs as much as copying.

    Raises:
        OSError, MemoryError: the system has not enough memory.
    """
    if shared:
        return present(reserve_slots(nbytes, count), nbytes)
    return tuple(_private_slot(index, nbytes) for index in range(count))


def reserve_slots(nbytes: int, count: int) -> tuple[Slot, ...]:
    """Shared slots of at most `nbytes` bytes each, which take no memory before they are `present`.

    Raises:
        OSError: the system has none.
    """
    memories = [map_shared(nbytes) for _ in range(count)]
    return tuple(Slot(index, each.buffer, nbytes, each.descriptor) for index, each in enumerate(memories))


def present(slots: Sequence[Slot], nbytes: int) -> tuple[Slot, ...]:
    """The first `nbytes` of reserved slots, with their pages.

    Raises:
        OSError: the system has not enough memory.
    """
    for slot in slots:
        make_present(slot.tensor.data_ptr(), nbytes)
    return tuple(slot.first(nbytes) for slot in slots)


def _private_slot(index: int, nbytes: int) -> Slot:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for name in _ADVICE:
        _advise(memory, name)
    _private.add(memory)
    slot = Slot(index, memory, nbytes)
    slot.tensor.zero_()
    return slot


def _advise(memory: mmap.mmap, name: str) -> None:
    advice = getattr(mmap, name, None)
    if advice is None:
        return
    try:
        memory.madvise(advice)
    except OSError as error:  # a kernel without huge pages, for example; all is correct without
        log.debug("ema: slots are used without %s: %s", name, error)


def _leave_to_parent() -> None:
    """A forked child lacks the mappings, and other memory may have their place: they must not be unmapped."""
    for memory in _private:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class Pins:
    """The slots of one session that are locked in memory, so that a device can write to them asynchronously."""

    def __init__(self) -> None:
        self._pinned: list[tuple[Device, Tensor]] = []
        self._tried = False

    def pin(self, device: Device, slots: Sequence[Slot]) -> None:
        """Lock all slots, once; half a second for a GB. Without it snapshots are correct, and slow."""
        if self._tried:
            return
        self._tried = True
        for slot in slots:
            problem = device.pin(slot.tensor)
            if problem is not None:
                log.warning(
                    "ema: %d slots of %.0f MB could not be locked in memory (%s): each step waits for its snapshot's "
                    "copy; leave more memory free (a container has a limit of its own), or send fewer (every=)",
                    len(slots),
                    slot.tensor.nbytes / 1e6,
                    problem,
                )
                return
            self._pinned.append((device, slot.tensor))

    def release(self, *, unused: bool) -> None:
        """Unlock; memory that may still be in use (not `unused`) stays locked until the process ends."""
        while self._pinned:
            device, memory = self._pinned.pop()
            if unused:
                device.unpin(memory)
            else:
                _kept.append(memory)
