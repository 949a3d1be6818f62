"""Copies a snapshot from one CUDA device while training goes on.

Parameters do not change between the end of one optimizer step and the start of the next, so they are copied in that
window, on a stream of their own. Buffers change in forward, so they are copied within the device before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from trainer_client.model.shards import local_of
from trainer_client.model.sources import version_of
from trainer_client.staging.copy_plan import CopyPlan, pieces
from trainer_client.staging.cpu import slot_views
from trainer_client.staging.device import Device, DeviceEvent, DeviceStream
from trainer_client.staging.slots import Slot
from trainer_client.staging.transfer import AsyncCopy

PIECE_BYTES = 64 << 20  # another copy from the device, such as the loss, waits for one piece at most
BOUNCE_BYTES = 16 << 20  # the buffer in which tensors become row-major, piece by piece


@dataclass(frozen=True, slots=True)
class _Targets:
    """Views of a slot: one per tensor, and one per span."""

    tensors: list[Tensor]
    spans: list[Tensor]


class OverlappedStager:
    """Issues the copies of a snapshot, whose tensors are all on `device`, without waiting for them.

    Tensors keep their dtype and arrive row-major. Small ones are gathered in a scratch by a few kernels; large ones
    that are not row-major pass through a bounce buffer piece by piece. Both are allocated once.
    """

    def __init__(self, manifest: Manifest, device: Device, plan: CopyPlan | None = None) -> None:
        self._manifest = manifest
        self._device = device
        self._plan = CopyPlan.of(manifest) if plan is None else plan
        self._side = device.new_stream()
        self._ready = device.new_event()
        self._done: dict[int, DeviceEvent] = {}
        self._targets: dict[int, _Targets] = {}
        with torch.inference_mode(False):
            self._scratch = device.empty(self._plan.scratch_bytes)
            gathered = [(manifest.tensors[index], start) for index, start in self._plan.gathered]
            self._gathered = slot_views(self._scratch, gathered)
            self._spans = [self._scratch[s.scratch : s.scratch + s.nbytes] for s in self._plan.spans]
        self._bounce: list[Tensor] = []  # one tensor, allocated when needed
        self._latest: AsyncCopy | None = None

    @property
    def is_copying(self) -> bool:
        """Whether the latest copy is still in progress."""
        return self._latest is not None and not self._latest.finished

    def stage(self, tensors: Sequence[Tensor], slot: Slot) -> AsyncCopy:
        """Issue the copies of `tensors` (the manifest's order, dtypes and shapes) into `slot`."""
        if slot.index not in self._done:
            self._done[slot.index] = self._device.new_event()
        copy = AsyncCopy(self._device, self._done[slot.index], tensors)
        previous, self._latest = self._latest, copy
        compute = self._device.current_stream()
        try:
            with torch.no_grad():
                self._issue(tensors, slot, copy, previous, compute)
        except BaseException:
            copy.abandon()
            # What was issued must not arrive later in a slot that another snapshot uses.
            self._side.synchronize()
            compute.synchronize()
            raise
        return copy

    def hold_back_writes(self, written: Sequence[Tensor] | None = None) -> None:
        """Have the current stream wait for a copy in progress if it reads any of `written` (default: always)."""
        copy = self._latest
        if copy is None or copy.finished:
            return
        try:
            if not (written is None or copy.holds_any(written)):
                return
            if self._device.is_capturing():
                copy.seal()  # versions change but nothing is written; a graph cannot wait for work outside it
            else:
                copy.hold_back(self._device.current_stream())
        except Exception:
            copy.seal(spoiled=True)
            raise

    def _issue(
        self,
        tensors: Sequence[Tensor],
        slot: Slot,
        copy: AsyncCopy,
        previous: AsyncCopy | None,
        compute: DeviceStream,
    ) -> None:
        # Aliases, which share versions: after `p.data = x` the old memory must live until it is copied.
        aliases = [tensor.detach() for tensor in tensors]
        sources = [local_of(alias) for alias in aliases]  # of a sharded tensor the optimizer raises the version of all
        targets = self._targets_of(slot)
        plan = self._plan
        watched = [(aliases[index], version_of(aliases[index])) for index in plan.on_side]
        if previous is not None:
            previous.hold_back(compute)  # its copies read the scratch
        self._gather(sources)
        self._send(plan.on_compute, sources, targets.tensors)
        self._ready.record(compute)
        self._ready.wait(self._side)
        with self._device.issue_to(self._side):
            self._device.copy(targets.spans, self._spans)
            self._send(plan.on_side, sources, targets.tensors)
            copy.record(self._side, watched, [self._scratch, *self._bounce])

    def _gather(self, sources: Sequence[Tensor]) -> None:
        """Copy into the scratch, in one call for all tensors of a dtype whose strides are those of the scratch."""
        groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for (index, _), target in zip(self._plan.gathered, self._gathered, strict=True):
            source = sources[index]
            targets, similar = groups.setdefault((source.dtype, source.stride() == target.stride()), ([], []))
            targets.append(target)
            similar.append(source)
        for targets, similar in groups.values():
            self._device.copy(targets, similar)

    def _send(self, indices: Sequence[int], sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy tensors to the slot without the scratch, on the current stream."""
        direct: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index in indices:
            if sources[index].is_contiguous():
                direct[0].extend(pieces(targets[index], PIECE_BYTES))
                direct[1].extend(pieces(sources[index], PIECE_BYTES))
            else:
                self._send_bounced(sources[index], targets[index])
        self._device.copy(*direct)

    def _send_bounced(self, source: Tensor, target: Tensor) -> None:
        if not self._bounce:
            with torch.inference_mode(False), self._device.issue_to(self._side):
                self._bounce.append(self._device.empty(BOUNCE_BYTES))
        for from_, to in zip(pieces(source, BOUNCE_BYTES), pieces(target, BOUNCE_BYTES), strict=True):
            row_major = self._bounce[0][: from_.nbytes].view(from_.dtype).view(from_.shape)
            self._device.copy([row_major], [from_])
            self._device.copy([to], [row_major])

    def _targets_of(self, slot: Slot) -> _Targets:
        if slot.index not in self._targets:
            views = slot_views(slot.tensor, [(spec, spec.offset) for spec in self._manifest.tensors])
            with torch.inference_mode(False):
                spans = [slot.tensor[s.slot : s.slot + s.nbytes] for s in self._plan.spans]
            self._targets[slot.index] = _Targets(views, spans)
        return self._targets[slot.index]
