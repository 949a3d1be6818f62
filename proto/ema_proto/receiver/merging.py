"""The manifests of all ranks become the manifest of the run, and each box is dealt to one of its holders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ema_proto.dtypes import ITEM_BYTES
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.wire.boxes import Box, tiling_fault, whole
from ema_proto.wire.manifest import Manifest, Role, TensorSpec, layout
from ema_proto.wire.parts import Part, part_of


@dataclass(frozen=True)
class Merged:
    """The manifest of the run, without boxes, and the part of each rank."""

    manifest: Manifest
    parts: tuple[Part, ...]


def merge(manifests: Sequence[Manifest]) -> Merged:
    """Merge the manifests of ranks 0, 1, … of one trainer.

    A box that several ranks hold is sent by one of them: that of a buffer by the lowest rank, since buffers may differ
    between ranks and one rank's belong together, and others so that all ranks send about as many bytes.

    Raises:
        RemoteProtocolError: `ranks_differ`, two ranks describe a tensor differently; `not_tiled`, the boxes of a tensor
            overlap or leave a hole; `manifest_invalid`, there is nothing to send.
    """
    holders: defaultdict[str, dict[Box, list[int]]] = defaultdict(dict)
    known: dict[str, tuple[int, TensorSpec]] = {}
    for rank, manifest in enumerate(manifests):
        for tensor in manifest.tensors:
            first, described = known.setdefault(tensor.name, (rank, tensor))
            _check_alike(first, described, rank, tensor)
            held = whole(tensor.shape) if tensor.box is None else tensor.box
            if held.elements:
                holders[tensor.name].setdefault(held, []).append(rank)
    for name, (_, tensor) in known.items():
        fault = tiling_fault(tensor.shape, holders[name])
        if fault is not None:
            raise RemoteProtocolError(RejectCode.NOT_TILED, f"tensor {name!r} {list(tensor.shape)}: {fault}")
    merged = (replace(known[name][1], box=None) for name in _order([[t.name for t in m.tensors] for m in manifests]))
    try:
        manifest = layout(merged)
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.MANIFEST_INVALID, f"the tensors of all ranks together: {error}") from None
    senders = _deal([known[tensor.name][1] for tensor in manifest.tensors], holders)
    return Merged(manifest, tuple(_part(rank, each, senders) for rank, each in enumerate(manifests)))


def _check_alike(first: int, described: TensorSpec, rank: int, tensor: TensorSpec) -> None:
    for what in ("dtype", "shape", "role", "aliases"):
        one, other = getattr(described, what), getattr(tensor, what)
        if one != other:
            text = f"tensor {tensor.name!r} has {what} {_text(one)} on rank {first} and {_text(other)} on rank {rank}"
            raise RemoteProtocolError(RejectCode.RANKS_DIFFER, text)


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _order(names: Iterable[Sequence[str]]) -> list[str]:
    """All names in an order that agrees with each rank's: a name that is new comes before the next known one."""
    merged: list[str] = []
    known: set[str] = set()
    for ranks_names in names:
        before: dict[str, list[str]] = {}
        new: list[str] = []
        for name in ranks_names:
            if name not in known:
                new.append(name)
            elif new:
                before[name], new = new, []
        if before:
            merged = [each for name in merged for each in (*before.get(name, ()), name)]
        merged += new
        known.update(ranks_names)
    return merged


def _deal(tensors: Sequence[TensorSpec], holders: dict[str, dict[Box, list[int]]]) -> dict[tuple[str, Box], int]:
    """The rank that sends each box."""
    boxes = [
        (box.elements * ITEM_BYTES[tensor.dtype], tensor, box, ranks)
        for tensor in tensors
        for box, ranks in holders[tensor.name].items()
    ]
    load: defaultdict[int, int] = defaultdict(int)
    senders: dict[tuple[str, Box], int] = {}
    for nbytes, tensor, box, ranks in sorted(boxes, key=lambda each: -each[0]):
        is_state = tensor.role in (Role.BUFFER, Role.STRUCTURAL)
        rank = ranks[0] if is_state else min(ranks, key=lambda each: (load[each], each))
        load[rank] += nbytes
        senders[tensor.name, box] = rank
    return senders


def _part(rank: int, manifest: Manifest, senders: dict[tuple[str, Box], int]) -> Part:
    indices = tuple(
        index
        for index, tensor in enumerate(manifest.tensors)
        if senders.get((tensor.name, tensor.box or whole(tensor.shape))) == rank
    )
    return part_of(manifest, indices)
