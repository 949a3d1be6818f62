"""Safetensors files: headers written and read, and where each tensor lies.

A server's headers say `format=pt`, which loaders look for, and hold nothing else that is not a tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ema_proto.dtypes import ITEM_BYTES

CHUNK_BYTES = 4 << 20  # large enough for full speed

FORMAT_PT: Mapping[str, str] = {"format": "pt"}

_METADATA_KEY = "__metadata__"
_HEADER_ALIGN = 8
_HEADER_BYTES_MAX = 100 << 20  # the limit of the safetensors library
_LENGTH = struct.Struct("<Q")

Parsed = TypeVar("Parsed")


class BadModelFile(ValueError):
    """The file is not a safetensors file, or does not hold the expected tensors."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file; `dtype` as in safetensors (`F32`), `offset` is its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


def describe(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] = FORMAT_PT
) -> tuple[bytes, tuple[Stored, ...]]:
    """The header of a file of these tensors (name, dtype, shape) in this order, and where each one lies.

    The headers of a run's versions are the same, so `metadata` is constant there.
    """
    position, described = 0, dict[str, object]({_METADATA_KEY: dict(metadata)})
    placed: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        placed.append((name, dtype, shape, position))
        position = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGN)
    header = _LENGTH.pack(len(text)) + text
    return header, tuple(Stored(name, dtype, shape, len(header) + at) for name, dtype, shape, at in placed)


def read_header(path: Path) -> tuple[Stored, ...]:
    """The tensors of a file, by offset.

    Raises:
        BadModelFile: it is not a safetensors file.
        OSError: the disk fails.
    """
    return _read(path, _parse)


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a file says besides its tensors.

    Raises:
        BadModelFile: it is not a safetensors file.
        OSError: the disk fails.
    """
    return _read(path, lambda text: dict(json.loads(text).get(_METADATA_KEY) or {}))


def data_shift(path: Path, header: bytes) -> int:
    """How many bytes later the data of a file begins than in a file with this header, for the same tensors.

    It is not 0 for files that were written before headers had `format=pt`.

    Raises:
        BadModelFile: the file holds other tensors, or is not a safetensors file.
        OSError: the disk fails.
    """
    found, planned = read_header(path), _parse(header[_LENGTH.size :])
    shift = found[0].offset - planned[0].offset if found and planned else 0
    if found != tuple(replace(stored, offset=stored.offset + shift) for stored in planned):
        raise BadModelFile(f"{path} holds other tensors than the manifest says")
    return shift


def replaced(path: Path, tensors: Mapping[str, bytes]) -> Iterator[bytes]:
    """The bytes of a file, piece by piece, with these tensors replaced.

    Args:
        path: a safetensors file.
        tensors: new bytes by name, in the dtype and shape of the file. Each tied name is a tensor of its own.

    Raises:
        BadModelFile: the file lacks a tensor, or has it in another size.
        OSError: the disk fails.
    """
    stored = read_header(path)
    sizes = {item.name: item.nbytes for item in stored}
    for name, data in tensors.items():
        if name not in sizes:
            raise BadModelFile(f"{path} has no tensor {name!r}")
        if len(data) != sizes[name]:
            raise BadModelFile(f"tensor {name!r} has {len(data)} bytes, {path} has {sizes[name]} for it")
    yield describe((item.name, item.dtype, item.shape) for item in stored)[0]
    with path.open("rb") as file:
        for item in stored:
            if item.name in tensors:
                yield tensors[item.name]
            else:
                yield from pieces_of(file.fileno(), item.offset, item.offset + item.nbytes)


def pieces_of(fd: int, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of an open file, 4 MiB at a time."""
    for at in range(begin, end, CHUNK_BYTES):
        yield os.pread(fd, min(CHUNK_BYTES, end - at), at)


def _read(path: Path, parse: Callable[[bytes], Parsed]) -> Parsed:
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else _HEADER_BYTES_MAX + 1
        text = file.read(length) if length <= _HEADER_BYTES_MAX else b""
    try:
        if len(text) < length:
            raise ValueError(f"its header has {length} bytes, of which {len(text)} can be read")
        return parse(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModelFile(f"{path} is not a safetensors file: {error!r}") from None


def _parse(text: bytes) -> tuple[Stored, ...]:
    """The tensors that a header describes, by offset in the file."""
    begin = _LENGTH.size + len(text)
    described = json.loads(text).items()
    found = [_stored(name, entry, begin) for name, entry in described if name != _METADATA_KEY]
    return tuple(sorted(found, key=lambda stored: stored.offset))


def _stored(name: str, entry: Mapping[str, object], begin: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(end)]}:
            if dtype not in ITEM_BYTES:
                raise ValueError(f"tensor {name!r} has dtype {dtype}; known are {', '.join(ITEM_BYTES)}")
            stored = Stored(name, dtype, tuple(int(size) for size in shape), begin + first)
            if stored.nbytes == end - first:
                return stored
    raise ValueError(f"tensor {name!r} is described as {entry!r}")
