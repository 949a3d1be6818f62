"""Slots locked in memory, so that a device writes to them directly while the host does something else.

Comes in: a device and slots. Goes out: locked memory, or one warning; unlocked again when nobody reads or writes it any
more. Knows no tensors of a model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from trainer_client.staging.cpu import Slot
from trainer_client.staging.device import Device

log = logging.getLogger("ema")

# Memory must not go back to the system while it is locked: what could not be unlocked is kept for good.
_kept: list[Tensor] = []


class Pins:
    """What one session has locked."""

    def __init__(self) -> None:
        self._pinned: list[tuple[Device, Tensor]] = []
        self._asked = False

    def pin(self, device: Device, slots: Sequence[Slot]) -> None:
        """Lock all slots, once; half a second for a GB. Without it snapshots are right, and slow."""
        if self._asked:
            return
        self._asked = True
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
        """Unlock; when the memory may be in use still (not `unused`), leave it locked until the process ends."""
        while self._pinned:
            device, memory = self._pinned.pop()
            if unused:
                device.unpin(memory)
            else:
                _kept.append(memory)
