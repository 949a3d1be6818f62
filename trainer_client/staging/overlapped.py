"""Copies a snapshot from one CUDA device while training goes on.

Parameters do not change between the end of one optimizer step and the start of the next, so they are copied in that
window, on a stream of their own. Buffers change in forward, so they are copied within the device before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ema_proto.wire.manifest import Manifest
from trainer_client.model.shards import locals_of
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
    """Views of a slot: each tensor that is not gathered, by its index, whole and in pieces, and one per span.

    `scattered` are the places of what the host brings there, each with the host memory that it comes from.
    """

    whole: dict[int, Tensor]
    pieces: dict[int, tuple[Tensor, ...]]
    spans: list[Tensor]
    scattered: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The gathered tensors of one dtype: their indices, and for each a view of the scratch and its strides."""

    indices: list[int]
    targets: list[Tensor]
    strides: list[tuple[int, ...]]


class OverlappedStager:
    """Issues the copies of a snapshot, whose tensors are all on `device`, without waiting for them.

    Tensors keep their dtype and arrive row-major. Small ones are gathered in a scratch by a few kernels; large ones
    that are not row-major pass through a bounce buffer piece by piece. Both are allocated once. What depends only on
    the manifest and the slot is computed once, because issuing the copies takes the training thread's time.
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
            self._gathered = _by_dtype(manifest, self._plan, self._scratch)
            self._spans = [self._scratch[s.scratch : s.scratch + s.nbytes] for s in self._plan.spans]
            if self._plan.scattered:
                self._spans.append(self._scratch[: self._plan.scattered_bytes])
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
        plan, targets = self._plan, self.prepare(slot)
        # Aliases, which share versions: after `p.data = x` the old memory must live until it is copied. What the
        # current stream copies needs none: freed memory is used again in the order of that stream.
        aliases = [tensors[index].detach() for index in plan.on_side]
        # Of a sharded tensor the optimizer raises the version of the whole, so that is watched and its part copied.
        watched = [(alias, version_of(alias)) for alias in aliases]
        if previous is not None:
            previous.hold_back(compute)  # its copies read the scratch
        self._gather(tensors)
        self._send(plan.on_compute, locals_of([tensors[index] for index in plan.on_compute]), targets)
        self._ready.record(compute)
        self._ready.wait(self._side)
        with self._device.issue_to(self._side):
            self._device.copy(targets.spans, self._spans)
            self._send(plan.on_side, locals_of(aliases), targets)
            copy.record(self._side, watched, [self._scratch, *self._bounce], targets.scattered)

    def _gather(self, tensors: Sequence[Tensor]) -> None:
        """Copy into the scratch, in one call for all tensors of a dtype whose strides are those of the scratch."""
        for group in self._gathered:
            sources = list(locals_of([tensors[index] for index in group.indices]))
            strides = [source.stride() for source in sources]
            if strides == group.strides:
                self._device.copy(group.targets, sources)
                continue
            similar = [ours == theirs for ours, theirs in zip(group.strides, strides, strict=True)]
            for wanted in (True, False):
                chosen = [number for number, is_similar in enumerate(similar) if is_similar is wanted]
                self._device.copy([group.targets[n] for n in chosen], [sources[n] for n in chosen])

    def _send(self, indices: Iterable[int], sources: Iterable[Tensor], targets: _Targets) -> None:
        """Copy tensors to the slot without the scratch, on the current stream."""
        direct: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index, source in zip(indices, sources, strict=True):
            there = targets.pieces[index]
            if not source.is_contiguous():
                self._send_bounced(source, targets.whole[index])
            elif len(there) == 1:
                direct[0].append(there[0])
                direct[1].append(source)
            else:
                direct[0].extend(there)
                direct[1].extend(pieces(source, PIECE_BYTES))
        self._device.copy(*direct)

    def _send_bounced(self, source: Tensor, target: Tensor) -> None:
        if not self._bounce:
            with torch.inference_mode(False), self._device.issue_to(self._side):
                self._bounce.append(self._device.empty(BOUNCE_BYTES))
        for from_, to in zip(pieces(source, BOUNCE_BYTES), pieces(target, BOUNCE_BYTES), strict=True):
            row_major = self._bounce[0][: from_.nbytes].view(from_.dtype).view(from_.shape)
            self._device.copy([row_major], [from_])
            self._device.copy([to], [row_major])

    def prepare(self, slot: Slot) -> _Targets:
        """Compute and allocate what copies into `slot` need; done at its first snapshot otherwise."""
        if slot.index not in self._targets:
            indices = [*self._plan.on_compute, *self._plan.on_side]
            specs = [self._manifest.tensors[index] for index in indices]
            views = slot_views(slot.tensor, [(spec, spec.offset) for spec in specs])
            whole = dict(zip(indices, views, strict=True))
            with torch.inference_mode(False):
                spans = [slot.tensor[s.slot : s.slot + s.nbytes] for s in self._plan.spans]
                if self._plan.scattered:
                    spans.append(self._device.host(self._plan.scattered_bytes))
                scattered = [
                    (slot.tensor[s.slot : s.slot + s.nbytes], spans[-1][s.scratch : s.scratch + s.nbytes])
                    for s in self._plan.scattered
                ]
                split = {index: tuple(pieces(view, PIECE_BYTES)) for index, view in whole.items()}
            self._targets[slot.index] = _Targets(whole, split, spans, scattered)
        return self._targets[slot.index]


def _by_dtype(manifest: Manifest, plan: CopyPlan, scratch: Tensor) -> list[_Gathered]:
    """The gathered tensors, those of one dtype together: one call can copy them."""
    places = [(manifest.tensors[index], start) for index, start in plan.gathered]
    groups: dict[torch.dtype, _Gathered] = {}
    for (index, _), target in zip(plan.gathered, slot_views(scratch, places), strict=True):
        group = groups.setdefault(target.dtype, _Gathered([], [], []))
        group.indices.append(index)
        group.targets.append(target)
        group.strides.append(target.stride())
    return list(groups.values())
