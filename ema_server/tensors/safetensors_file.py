"""A `model.safetensors` as it lies on disk: which tensor has which bytes. Comes in: a path, or tensors to describe.

Goes out: places and headers. It reads headers only, and knows nothing of averages; what the bytes mean is the caller's.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ema_proto.dtypes import ITEM_BYTES

CHUNK_BYTES = 4 << 20  # large enough for full speed, small enough to be no memory to speak of

_HEADER_ALIGN = 8
_HEADER_BYTES_MAX = 100 << 20  # safetensors' own bound
_LENGTH = struct.Struct("<Q")


class BadModelFile(ValueError):
    """The file is no safetensors file, or one that lacks what is looked for; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: name, dtype as in safetensors (`F32`), shape, and its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.elements * ITEM_BYTES[self.dtype]


def describe(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, tuple[Stored, ...]]:
    """The header of a file that holds these tensors (name, dtype, shape) one after another, and where each one lies."""
    position, described, placed = 0, {}, list[Stored]()
    for name, dtype, shape in tensors:
        stored = Stored(name, dtype, shape, position)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + stored.nbytes]}
        placed.append(stored)
        position += stored.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN)
    header = _LENGTH.pack(len(text)) + text
    return header, tuple(Stored(at.name, at.dtype, at.shape, len(header) + at.offset) for at in placed)


def read_header(path: Path) -> tuple[Stored, ...]:
    """The tensors of a file, in the order in which they lie there.

    Raises:
        BadModelFile: it is not a safetensors file.
        OSError: the disk fails.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else _HEADER_BYTES_MAX + 1
        text = file.read(length) if length <= _HEADER_BYTES_MAX else b""
    try:
        if len(text) < length:
            raise ValueError(f"its header has {length} bytes, of which {len(text)} can be read")
        described = json.loads(text)
        begin = _LENGTH.size + length
        found = [_stored(name, entry, begin) for name, entry in described.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModelFile(f"{path} is not a safetensors file: {error!r}") from None
    return tuple(sorted(found, key=lambda stored: stored.offset))


def replaced(path: Path, tensors: Mapping[str, bytes]) -> Iterator[bytes]:
    """The bytes of a file, piece by piece, with the bytes of these tensors in place of its own.

    Args:
        path: a safetensors file.
        tensors: new bytes by name, of the dtype and shape that the file has. A tied name counts as a tensor of its own.

    Raises:
        BadModelFile: the file lacks a tensor, or has it in another size.
        OSError: the disk fails.
    """
    stored = {item.name: item for item in read_header(path)}
    for name, data in tensors.items():
        if name not in stored:
            raise BadModelFile(f"{path} has no tensor {name!r}")
        if len(data) != stored[name].nbytes:
            raise BadModelFile(f"tensor {name!r} has {len(data)} bytes, {path} has {stored[name].nbytes} for it")
    with path.open("rb") as file:
        for item in sorted((stored[name] for name in tensors), key=lambda item: item.offset):
            yield from pieces_of(file.fileno(), file.tell(), item.offset)
            yield tensors[item.name]
            file.seek(item.offset + item.nbytes)
        yield from pieces_of(file.fileno(), file.tell(), path.stat().st_size)


def pieces_of(fd: int, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of an open file, 4 MiB at a time."""
    for at in range(begin, end, CHUNK_BYTES):
        yield os.pread(fd, min(CHUNK_BYTES, end - at), at)


def _stored(name: str, entry: Mapping[str, object], begin: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(end)]}:
            stored = Stored(name, dtype, tuple(int(size) for size in shape), begin + first)
            if stored.nbytes == end - first:
                return stored
    raise ValueError(f"tensor {name!r} is described as {entry!r}")
