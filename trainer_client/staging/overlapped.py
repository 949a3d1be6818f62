"""Copying a snapshot while training goes on: the stager for a model that lies on one device.

Parameters stay as they are from the end of one optimizer step to the beginning of the next, so the copy engine works in
that window, on a stream of its own; buffers change in forward, so they are secured before it. Comes in: live tensors
and a slot. Goes out: a `AsyncCopy`. Nothing here waits. Knows no steps, no optimizer, no socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from trainer_client.model.sources import version_of
from trainer_client.staging.copy_plan import CopyPlan, pieces, plan_routes
from trainer_client.staging.cpu import Slot, slot_views
from trainer_client.staging.device import Device, DeviceEvent, DeviceStream
from trainer_client.staging.transfer import AsyncCopy

PIECE_BYTES = 64 << 20  # another copy from the device, such as a loss's, waits for one piece at most
BOUNCE_BYTES = 16 << 20  # where tensors that are not row-major become so, piece by piece


@dataclass(frozen=True, slots=True)
class _Targets:
    """Views of a slot: of each tensor, and of each span that comes from the scratch."""

    tensors: list[Tensor]
    spans: list[Tensor]


class OverlappedStager:
    """Issues a snapshot's copies and returns.

    Args:
        manifest: of the snapshots.
        device: where all tensors are.
        routes: which way each tensor takes; default: see `plan_routes`.

    Everything is of the source's dtype and arrives row-major. On the device, small tensors are gathered in a scratch by
    a few kernels, and those that are not row-major are laid out anew piece by piece in the bounce; both are made once.
    """

    def __init__(self, manifest: Manifest, device: Device, routes: CopyPlan | None = None) -> None:
        self._manifest = manifest
        self._device = device
        self._routes = plan_routes(manifest) if routes is None else routes
        self._side = device.new_stream()
        self._ready = device.new_event()
        self._done: dict[int, DeviceEvent] = {}
        self._targets: dict[int, _Targets] = {}
        with torch.inference_mode(False):
            self._scratch = device.empty(self._routes.scratch_bytes)
            self._gathered = slot_views(self._scratch, manifest.tensors, dict(self._routes.gathered))
            self._spans = [self._scratch[s.scratch : s.scratch + s.nbytes] for s in self._routes.spans]
        self._bounce: list[Tensor] = []  # one, once it is needed
        self._newest: AsyncCopy | None = None

    @property
    def is_copying(self) -> bool:
        """Whether the newest copy has not ended."""
        return self._newest is not None and not self._newest.finished

    def stage(self, tensors: Sequence[Tensor], slot: Slot) -> AsyncCopy:
        """Issue the copies of `tensors` (the manifest's order, dtypes and shapes) into `slot`."""
        if slot.index not in self._done:
            self._done[slot.index] = self._device.new_event()
        transfer = AsyncCopy(self._device, self._done[slot.index], tensors)
        before, self._newest = self._newest, transfer
        compute = self._device.current_stream()
        try:
            with torch.no_grad():
                self._issue(tensors, slot, transfer, before, compute)
        except BaseException:
            transfer.abandon()
            # What was issued must not arrive in a slot that goes to another snapshot.
            self._side.synchronize()
            compute.synchronize()
            raise
        return transfer

    def hold_back_writes(self, written: Sequence[Tensor] | None = None) -> None:
        """Have the current stream wait for a copy under way, if any of `written` (default: yes) is part of it."""
        transfer = self._newest
        if transfer is None or transfer.finished:
            return
        try:
            if not (written is None or transfer.holds_any(written)):
                return
            if self._device.is_capturing():
                transfer.seal()  # versions change and nothing is written; a graph cannot wait for what is outside it
            else:
                transfer.hold_back(self._device.current_stream())
        except Exception:
            transfer.seal(spoiled=True)
            raise

    def _issue(
        self,
        tensors: Sequence[Tensor],
        slot: Slot,
        transfer: AsyncCopy,
        before: AsyncCopy | None,
        compute: DeviceStream,
    ) -> None:
        # Aliases: `p.data = x` gives the parameter other memory, and this must outlive the copy. They share versions.
        sources = [tensor.detach() for tensor in tensors]
        targets = self._targets_of(slot)
        routes = self._routes
        watched = [(sources[index], version_of(sources[index])) for index in routes.on_side]
        if before is not None:
            before.hold_back(compute)  # its copies read the scratch
        self._gather(sources)
        self._send(routes.on_compute, sources, targets.tensors)
        self._ready.record(compute)
        self._ready.wait(self._side)
        with self._device.issue_to(self._side):
            self._device.copy(targets.spans, self._spans)
            self._send(routes.on_side, sources, targets.tensors)
            transfer.record(self._side, watched, [self._scratch, *self._bounce])

    def _gather(self, sources: Sequence[Tensor]) -> None:
        """Copy into the scratch, in one call for all of one dtype whose strides are those of the scratch."""
        groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        for index, _ in self._routes.gathered:
            target, source = self._gathered[index], sources[index]
            targets, alike = groups.setdefault((source.dtype, source.stride() == target.stride()), ([], []))
            targets.append(target)
            alike.append(source)
        for targets, alike in groups.values():
            self._device.copy(targets, alike)

    def _send(self, indices: Sequence[int], sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy from where the tensors lie to the slot, on the current stream."""
        straight: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index in indices:
            if sources[index].is_contiguous():
                straight[0].extend(pieces(targets[index], PIECE_BYTES))
                straight[1].extend(pieces(sources[index], PIECE_BYTES))
            else:
                self._send_bounced(sources[index], targets[index])
        self._device.copy(*straight)

    def _send_bounced(self, source: Tensor, target: Tensor) -> None:
        if not self._bounce:
            with torch.inference_mode(False), self._device.issue_to(self._side):
                self._bounce.append(self._device.empty(BOUNCE_BYTES))
        for piece, place in zip(pieces(source, BOUNCE_BYTES), pieces(target, BOUNCE_BYTES), strict=True):
            row_major = self._bounce[0][: piece.nbytes].view(piece.dtype).view(piece.shape)
            self._device.copy([row_major], [piece])
            self._device.copy([place], [row_major])

    def _targets_of(self, slot: Slot) -> _Targets:
        if slot.index not in self._targets:
            places = {index: spec.offset for index, spec in enumerate(self._manifest.tensors)}
            with torch.inference_mode(False):
                views = slot_views(slot.tensor, self._manifest.tensors, places)
                spans = [slot.tensor[s.slot : s.slot + s.nbytes] for s in self._routes.spans]
            self._targets[slot.index] = _Targets(list(views.values()), spans)
        return self._targets[slot.index]
