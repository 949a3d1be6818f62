"""Chooses how a snapshot is copied, by where its tensors are.

If all are on one CUDA device, they are copied while training goes on. Otherwise (CPU, mps, xpu, several devices, a
device without room) they are copied synchronously.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from trainer_client.staging.cpu import Check, CpuStager
from trainer_client.staging.device import Device, DeviceOf
from trainer_client.staging.overlapped import OverlappedStager
from trainer_client.staging.slots import Pins, Slot
from trainer_client.staging.transfer import AsyncCopy

log = logging.getLogger("ema")

_CPU: Final = frozenset({torch.device("cpu")})


class Stagers:
    """The stagers of one run.

    Args:
        manifest: of its snapshots.
        slots: all that snapshots are copied into.
        pins: locks the slots in memory for a device.
        device_of: the device behind a torch device, None where copies cannot overlap training.
    """

    def __init__(self, manifest: Manifest, slots: Sequence[Slot], pins: Pins, device_of: DeviceOf) -> None:
        self._manifest = manifest
        self._slots = slots
        self._pins = pins
        self._device_of = device_of
        self._cpu = CpuStager(manifest)
        self._locations: frozenset[torch.device] = frozenset()
        self._devices: list[Device] = []
        self._overlapped: OverlappedStager | None = None

    def prepare(self, tensors: Sequence[Tensor]) -> bool:
        """Prepare for tensors on these devices; whether their copies can overlap training."""
        if self._locations != _CPU or not self._cpu.are_on_cpu(tensors):
            locations = frozenset(tensor.device for tensor in tensors)
            if locations != self._locations:
                self._move_to(locations)
        return self._overlapped is not None

    def stage(self, tensors: Sequence[Tensor], slot: Slot, check: Check) -> AsyncCopy | None:
        """Copy `tensors` into `slot`, or start to: None if it is filled when this returns.

        Args:
            tensors: what is copied.
            slot: where to.
            check: raises if those with these indices have not the manifest's dtypes and shapes.
        """
        if self.prepare(tensors) and self._overlapped is not None:
            check(tensors, range(len(tensors)))
            try:
                return self._overlapped.stage(tensors, slot)
            except torch.cuda.OutOfMemoryError as error:
                self._give_up(error)
        self._cpu.stage(tensors, slot, check)
        return None

    @property
    def is_copying(self) -> bool:
        """Whether a copy is in progress that writes can tear."""
        return self._overlapped is not None and self._overlapped.is_copying

    def is_capturing(self) -> bool:
        """Whether a snapshot taken now would become part of a graph."""
        return any(device.is_capturing() for device in self._devices)

    def hold_back_writes(self, written: Sequence[Tensor] | None = None) -> None:
        """Have the device finish a copy in progress before it writes to `written` (default: to anything)."""
        if self._overlapped is not None:
            self._overlapped.hold_back_writes(written)

    def _move_to(self, locations: frozenset[torch.device]) -> None:
        self.hold_back_writes()
        self._locations, self._overlapped = locations, None
        self._devices = [device for device in map(self._device_of, locations) if device is not None]
        if len(locations) == len(self._devices) == 1:
            try:
                self._pins.pin(self._devices[0], self._slots)
                stager = OverlappedStager(self._manifest, self._devices[0])
                for slot in self._slots:
                    stager.prepare(slot)
                self._overlapped = stager
            # The run is joined and training goes on: a broken device will raise there.
            except RuntimeError as error:
                self._give_up(error)

    def _give_up(self, error: RuntimeError) -> None:
        """Copy synchronously from now on: asking a full device for memory again would delay each step."""
        self._overlapped = None
        log.warning(
            "ema: snapshots cannot be copied while training goes on (%s): each step waits for its copy; if the device "
            "is short of memory, leave 64 MiB free, or pass overlap=False",
            str(error).partition("\n")[0],
        )
