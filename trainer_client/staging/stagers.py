"""Which way a snapshot is copied: by where its tensors are.

Comes in: live tensors and a slot. Goes out: a filled slot, or a `AsyncCopy` that is filling it. All on one CUDA device:
copied while training goes on. Anything else (CPU, mps, xpu, a mix), and a device without room: one synchronous copy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from trainer_client.staging.cpu import CpuStager, Slot
from trainer_client.staging.device import Device, DeviceOf
from trainer_client.staging.overlapped import OverlappedStager
from trainer_client.staging.pinned_memory import Pins
from trainer_client.staging.transfer import AsyncCopy

log = logging.getLogger("ema")


class Stagers:
    """The stagers of one run.

    Args:
        manifest: of its snapshots.
        slots: what they go into.
        pins: locks the slots when a device is to write into them.
        device_of: the device behind a torch device, None where copies cannot overlap.
    """

    def __init__(self, manifest: Manifest, slots: Sequence[Slot], pins: Pins, device_of: DeviceOf) -> None:
        self._manifest = manifest
        self._slots = slots
        self._pins = pins
        self._device_of = device_of
        self._cpu = CpuStager(manifest)
        self._places: frozenset[torch.device] = frozenset()
        self._devices: list[Device] = []
        self._overlapped: OverlappedStager | None = None

    def look(self, tensors: Sequence[Tensor]) -> bool:
        """Make ready for tensors that lie where these do; whether their copies can overlap."""
        places = frozenset(tensor.device for tensor in tensors)
        if places != self._places:
            self._move(places)
        return self._overlapped is not None

    def stage(self, tensors: Sequence[Tensor], slot: Slot) -> AsyncCopy | None:
        """Copy, or begin to: None when the slot is filled already."""
        if self.look(tensors) and self._overlapped is not None:
            try:
                return self._overlapped.stage(tensors, slot)
            except torch.cuda.OutOfMemoryError as error:
                self._give_up(error)
        self._cpu.stage(tensors, slot)
        return None

    @property
    def is_copying(self) -> bool:
        """Whether a copy is under way that writes can tear."""
        return self._overlapped is not None and self._overlapped.is_copying

    def is_capturing(self) -> bool:
        """Whether a snapshot now would become part of a graph."""
        return any(device.is_capturing() for device in self._devices)

    def hold_back_writes(self, written: Sequence[Tensor] | None = None) -> None:
        """Have the device end a copy that is under way before it writes to `written` (default: anything) of it."""
        if self._overlapped is not None:
            self._overlapped.hold_back_writes(written)

    def _move(self, places: frozenset[torch.device]) -> None:
        self.hold_back_writes()
        self._places, self._overlapped = places, None
        self._devices = [device for device in map(self._device_of, places) if device is not None]
        if len(places) == len(self._devices) == 1:
            try:
                self._pins.pin(self._devices[0], self._slots)
                self._overlapped = OverlappedStager(self._manifest, self._devices[0])
            # The run is joined, and training goes on: a device that is broken will be met there.
            except RuntimeError as error:
                self._give_up(error)

    def _give_up(self, error: RuntimeError) -> None:
        """Copy synchronously for good: to ask a full device for memory again would hold up each step."""
        self._overlapped = None
        log.warning(
            "ema: snapshots cannot be copied while training goes on (%s): each step waits for its copy; where memory "
            "of the device is short, leave 64 MiB, or pass overlap=False",
            str(error).partition("\n")[0],
        )
