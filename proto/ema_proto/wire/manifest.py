"""The tensors of a snapshot and their layout in one flat buffer.

Tensors are packed without padding, ordered by item size (large first), then dtype, then the order of the
state dict: every element is aligned to its own size, and all floats of one dtype lie together.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from ema_proto.dtypes import FLOATS, ITEM_BYTES
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import DIMENSIONS_MAX, TENSOR_NAME_CHARS_MAX, TENSORS_MAX
from ema_proto.wire.body import shown
from ema_proto.wire.boxes import Box, lies_within

_DTYPE_ORDER = {dtype: index for index, dtype in enumerate(ITEM_BYTES)}
_LAYOUT_KEYS = {dtype: (-nbytes, _DTYPE_ORDER[dtype]) for dtype, nbytes in ITEM_BYTES.items()}
_BYTES_MAX = (1 << 63) - 1
_ENCODED_AT_ONCE = 1000  # tensors: the encoder holds the interpreter's lock


class Role(StrEnum):
    """How an average may treat a tensor, together with its dtype."""

    PARAM = "param"
    FROZEN = "frozen"
    BUFFER = "buffer"
    STRUCTURAL = "structural"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a snapshot, or the box of it that a rank holds.

    `shape` is that of the whole tensor; `box` is None where it is held whole. `offset` is the first byte in the flat
    buffer, `aliases` are its other (tied) names.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role
    offset: int
    aliases: tuple[str, ...] = ()
    box: Box | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its name, then the tied ones."""
        return (self.name, *self.aliases)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """The shape of what is held: of the tensor, or of the box."""
        return self.shape if self.box is None else self.box.sizes

    @property
    def elements(self) -> int:
        """Number of elements that are held (1 for a 0-d tensor)."""
        return math.prod(self.held_shape)

    @property
    def nbytes(self) -> int:
        """Size of what is held, in bytes."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """First byte after the tensor."""
        return self.offset + self.nbytes

    @property
    def is_float(self) -> bool:
        """Whether the dtype is a floating one."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Manifest:
    """The tensor specs of a snapshot, in the order of the state dict. Build with `layout` or `from_json`."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def nbytes(self) -> int:
        """Length of the flat buffer in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def by_offset(self) -> tuple[TensorSpec, ...]:
        """The tensors in the order in which they lie in the flat buffer (empty tensors before their neighbour)."""
        return tuple(sorted(self.tensors, key=lambda tensor: (tensor.offset, tensor.end)))

    @cached_property
    def digest(self) -> str:
        """64 hex digits that identify names, dtypes, shapes and layout of a manifest without boxes.

        Roles are left out: freezing a parameter does not change the layout, and a run keeps the roles it started with.
        """
        digest = hashlib.sha256(b"[")
        for begin in range(0, len(self.tensors), _ENCODED_AT_ONCE):
            some = self.tensors[begin : begin + _ENCODED_AT_ONCE]
            lines = [[t.name, t.dtype, list(t.shape), t.offset, list(t.aliases)] for t in some]
            digest.update(b"," if begin else b"")
            digest.update(json.dumps(lines, separators=(",", ":"))[1:-1].encode())
        digest.update(b"]")
        return digest.hexdigest()

    def to_json(self) -> list[dict[str, Any]]:
        """The manifest as JSON values, one object per tensor."""
        return [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "role": t.role.value,
                "offset": t.offset,
                **({"aliases": list(t.aliases)} if t.aliases else {}),
                **({"box": {"offsets": list(t.box.offsets), "sizes": list(t.box.sizes)}} if t.box else {}),
            }
            for t in self.tensors
        ]

    def first_difference(self, other: Manifest, *, any_order: bool = False) -> str | None:
        """Describe the first difference of `other` from this manifest; None when there is none.

        With `any_order` the tensors of `other` may come in another order, and lie elsewhere in the flat buffer.
        """
        mine = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        for t in other.tensors:
            known = mine.get(t.name)
            if known is None:
                return f"tensor {t.name!r} is new"
            if (known.dtype, known.shape) != (t.dtype, t.shape):
                return f"tensor {t.name!r} is {t.dtype}{list(t.shape)}, it was {known.dtype}{list(known.shape)}"
            if known.box != t.box:
                return f"of tensor {t.name!r} this rank holds {t.box or 'all'}, it held {known.box or 'all'}"
            if known.aliases != t.aliases:
                return f"tensor {t.name!r} is tied to {_names(t.aliases)}, it was tied to {_names(known.aliases)}"
        for name in mine:
            if name not in theirs:
                return f"tensor {name!r} is gone"
        if not any_order and self.digest != other.digest:
            return "the tensors are in another order"
        return None


def layout(tensors: Iterable[TensorSpec]) -> Manifest:
    """Assign offsets to `tensors` (given in state-dict order, their own `offset` ignored) and validate the result.

    Raises:
        LocalProtocolError: names repeat, a dtype is unknown, a shape is impossible, or there is nothing to send.
    """
    given = tuple(tensors)
    try:
        for tensor in given:
            _check_tensor(tensor)
        return _checked_whole(Manifest(placed(given)))
    except RemoteProtocolError as error:
        raise LocalProtocolError(error.text) from None


def placed(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Assign offsets to valid tensors of different names."""
    offsets, position = {}, 0
    for tensor in sorted(tensors, key=_layout_key):
        offsets[tensor.name] = position
        position += tensor.nbytes
    return tuple(
        tensor if tensor.offset == offsets[tensor.name] else replace(tensor, offset=offsets[tensor.name])
        for tensor in tensors
    )


def from_json(value: object) -> Manifest:
    """Read a manifest from untrusted decoded JSON.

    Raises:
        RemoteProtocolError: `manifest_invalid`, with the tensor and the value that is wrong.
    """
    if not isinstance(value, list):
        raise _invalid("the manifest is not a list of tensors")
    return _checked(Manifest(tuple(_tensor_from_json(item) for item in value)))


def _names(names: tuple[str, ...]) -> str:
    """The first three of the names, for an error text."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + rest if names else "nothing"


def _layout_key(tensor: TensorSpec) -> tuple[int, int]:
    return _LAYOUT_KEYS[tensor.dtype]


def _tensor_from_json(item: object) -> TensorSpec:
    if not isinstance(item, Mapping):
        raise _invalid(f"{shown(item)} is not a tensor spec")
    name, dtype, shape = item.get("name"), item.get("dtype"), item.get("shape")
    role, offset, aliases = item.get("role"), item.get("offset"), item.get("aliases", [])
    label = shown(name)
    if not isinstance(name, str) or not isinstance(dtype, str):
        raise _invalid(f"tensor {label} has dtype {shown(dtype)}: both are texts")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise _invalid(f"tensor {label} has shape {shown(shape)}, not a list of integers")
    if type(offset) is not int:
        raise _invalid(f"tensor {label} has offset {shown(offset)}, not an integer")
    if role not in list(Role):
        raise _invalid(f"tensor {label} has role {shown(role)}; known are {', '.join(Role)}")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise _invalid(f"tensor {label} has aliases {shown(aliases)}, not a list of names")
    if "range" in item:
        raise _invalid(f"tensor {label} has a flat range, which this server does not support")
    box = _box_from_json(label, item)
    name = sys.intern(name)  # hundreds of ranks name the same tensors
    return TensorSpec(name, dtype, tuple(shape), Role(role), offset, tuple(aliases), box)


def _box_from_json(label: str, item: Mapping[str, Any]) -> Box | None:
    box = item.get("box")
    if box is None:
        return None
    offsets, sizes = (box.get("offsets"), box.get("sizes")) if isinstance(box, Mapping) else (None, None)
    if not isinstance(offsets, list) or not isinstance(sizes, list) or not all(type(n) is int for n in offsets + sizes):
        raise _invalid(f"tensor {label} has box {shown(box)}, not lists of integers as offsets and sizes")
    return Box(tuple(offsets), tuple(sizes))


def _check_tensor(tensor: TensorSpec) -> None:
    for name in tensor.names:
        if not 0 < len(name) <= TENSOR_NAME_CHARS_MAX or not name.isprintable():
            raise _invalid(
                f"tensor name {name[:80]!r} is empty, unprintable or over {TENSOR_NAME_CHARS_MAX} characters"
            )
        if name == "__metadata__":
            raise _invalid("the tensor name '__metadata__' is reserved by the safetensors format")
    if tensor.dtype not in ITEM_BYTES:
        raise _invalid(f"tensor {tensor.name!r} has dtype {tensor.dtype[:20]!r}; known are {', '.join(ITEM_BYTES)}")
    if len(tensor.shape) > DIMENSIONS_MAX or any(n < 0 for n in tensor.shape):
        text = f"tensor {tensor.name!r} has {len(tensor.shape)} dimensions, the smallest {min(tensor.shape)}"
        raise _invalid(f"{text}; allowed are {DIMENSIONS_MAX}, none negative")
    # Empty dimensions count as one here: strides of the others must be numbers too.
    span = math.prod(max(n, 1) for n in tensor.shape) * ITEM_BYTES[tensor.dtype]
    if tensor.box is not None and not lies_within(tensor.box, tensor.shape):
        box = f"a box of offsets {list(tensor.box.offsets)} and sizes {list(tensor.box.sizes)}"
        raise _invalid(f"tensor {tensor.name!r} has shape {list(tensor.shape)} and {box}, which does not lie in it")
    if not 0 <= tensor.offset <= _BYTES_MAX or tensor.offset + span > _BYTES_MAX:
        raise _invalid(f"tensor {tensor.name!r} lies outside the address space")


def _checked(manifest: Manifest) -> Manifest:
    for tensor in manifest.tensors:
        _check_tensor(tensor)
    return _checked_whole(manifest)


def _checked_whole(manifest: Manifest) -> Manifest:
    """The manifest of tensors each of which is valid."""
    tensors = manifest.tensors
    if not tensors or len(tensors) > TENSORS_MAX:
        raise _invalid(f"a snapshot has 1 to {TENSORS_MAX} tensors, this one {len(tensors)}")
    names = [name for tensor in tensors for name in tensor.names]
    if len(set(names)) < len(names):
        name, _ = Counter(names).most_common(1)[0]
        raise _invalid(f"tensor name {name!r} appears twice")
    position = 0
    for tensor in sorted(tensors, key=_layout_key):
        if tensor.offset != position:
            raise _invalid(f"tensor {tensor.name!r} is at byte {tensor.offset}, the layout puts it at {position}")
        position += tensor.nbytes
    if position > _BYTES_MAX:
        raise _invalid(f"the snapshot has {position} bytes, over the address space")
    if position == 0 and all(tensor.box is None for tensor in tensors):
        raise _invalid("the snapshot has no elements: there is nothing to average")
    return manifest


def _invalid(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(RejectCode.MANIFEST_INVALID, text)
