"""Averages in memory that the host cannot address, on a device behind a `Backend`.

The device's memory is read and written through one bounce buffer in host memory. A snapshot is brought there batch by
batch, in two stages: while one is filled, the other is moved or computed with. Work on the device is queued in streams;
all waiting between streams, and of the host for a stream, is in this file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.compute.backend import Backend, Stream
from ema_server.compute.device import Feed
from ema_server.compute.memory import Piece
from ema_server.tensors.dtypes import view
from ema_server.tensors.layout import Segment

# 4 MiB of float32: a few hundred microseconds to move, a few dozen for the calls that compute with it.
BLOCK_ELEMENTS = 1 << 20
BOUNCE_BYTES = 8 << 20

_STAGES = 2
_ITEM_BYTES_MAX = max(ITEM_BYTES.values())


class Accelerator:
    """A `Device` with memory of its own.

    One thread does a pass: it only copies and queues, and copies faster than a snapshot can arrive. `block_elements`
    are queued at a time; `bounce_bytes`, a multiple of 8, are read or written at a time.
    """

    workers = 1

    def __init__(
        self, name: str, backend: Backend, block_elements: int = BLOCK_ELEMENTS, bounce_bytes: int = BOUNCE_BYTES
    ) -> None:
        self.name = name
        self.block_elements = block_elements
        self.torch_device = backend.device
        self._backend = backend
        self._bounce = _Bounce(backend, bounce_bytes)

    def allocate(self, nbytes: int) -> DeviceMemory:
        free_bytes = self._backend.free_bytes()
        if nbytes > free_bytes:
            raise MemoryError(f"cannot allocate {nbytes} bytes on {self.name}: only {free_bytes} are available")
        return DeviceMemory(self._bounce.allocate(nbytes), self._bounce)

    def feed(self, block_elements: int) -> Feed:
        return Upload(self._backend, block_elements)

    def trim(self) -> None:
        self._backend.trim()

    def describe(self) -> str:
        return f"{self.name}: {self._backend.describe()}"


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMemory:
    """`Memory` on a device. Several threads may show and fill it; they take turns."""

    data: torch.Tensor
    _bounce: _Bounce

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def show(self, begin: int, end: int, take: Piece) -> None:
        self._bounce.down(self.data, begin, end, take)

    def fill(self, begin: int, end: int, give: Piece) -> None:
        self._bounce.up(self.data, begin, end, give)


class _Bounce:
    """A buffer in host memory for copies from and to the device, and the stream that makes them.

    It needs no mark against computing streams: a pass waits for its own end, and shows a block before it queues the
    change of the block.
    """

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self._backend = backend
        self._host = backend.host(nbytes)
        self._stream = backend.stream()
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Zeroed memory that every stream may use."""
        with self._stream.current():
            data = self._backend.allocate(nbytes)
        self._stream.mark().wait()
        return data

    def down(self, data: torch.Tensor, begin: int, end: int, take: Piece) -> None:
        for first in range(begin, end, self._host.nbytes):
            count = min(self._host.nbytes, end - first)
            with self._lock:
                with self._stream.current():
                    self._host.data.narrow(0, 0, count).copy_(data.narrow(0, first, count), non_blocking=True)
                self._stream.mark().wait()
                take(self._host.view[:count], first)

    def up(self, data: torch.Tensor, begin: int, end: int, give: Piece) -> None:
        for first in range(begin, end, self._host.nbytes):
            count = min(self._host.nbytes, end - first)
            with self._lock:
                give(self._host.view[:count], first)
                with self._stream.current():
                    data.narrow(0, first, count).copy_(self._host.data.narrow(0, 0, count), non_blocking=True)
                self._stream.mark().wait()


class _Stage:
    """A buffer in host memory that the device copies from by itself, and one on the device.

    `moved` is reached when the host's buffer may be written again, `used` when the device's may be.
    """

    __slots__ = ("data", "host", "moved", "used")

    def __init__(self, backend: Backend, nbytes: int, moving: Stream, computing: Stream) -> None:
        with computing.current():
            self.data = backend.allocate(nbytes)
        self.host = backend.host(nbytes).data
        self.moved, self.used = moving.mark(), computing.mark()


class Upload:
    """The `Feed` of one thread; no block has more than `block_elements`."""

    def __init__(self, backend: Backend, block_elements: int) -> None:
        self._nbytes = block_elements * _ITEM_BYTES_MAX
        self._moving, self._computing = backend.stream(), backend.stream()
        stages = (_Stage(backend, self._nbytes, self._moving, self._computing) for _ in range(_STAGES))
        self._stages = cycle(tuple(stages))

    @contextmanager
    def turn(self) -> Iterator[None]:
        try:
            with self._computing.current():
                yield
        finally:
            self._computing.mark().wait()

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        for batch in _batches(blocks, self._nbytes):
            begin, end = batch[0].wire_offset, batch[-1].wire_end
            stage = next(self._stages)
            self._move(stage, snapshot.narrow(0, begin, end - begin))
            stage.moved.hold()
            for block in batch:
                yield block, view(stage.data, block.dtype, block.wire_offset - begin, block.count)
            stage.used = self._computing.mark()

    def _move(self, stage: _Stage, source: torch.Tensor) -> None:
        count = source.numel()
        stage.moved.wait()
        host = stage.host.narrow(0, 0, count).copy_(source)
        with self._moving.current():
            stage.used.hold()
            stage.data.narrow(0, 0, count).copy_(host, non_blocking=True)
        stage.moved = self._moving.mark()


def _batches(blocks: Iterable[Segment], nbytes_max: int) -> Iterator[list[Segment]]:
    """Blocks within `nbytes_max` bytes of the snapshot, so that many small ones are moved at once.

    Each begins a multiple of its item size after the first one of its batch.
    """
    batch: list[Segment] = []
    for block in blocks:
        if batch and not _fits(block, batch[0].wire_offset, nbytes_max):
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def _fits(block: Segment, begin: int, nbytes_max: int) -> bool:
    return block.wire_end - begin <= nbytes_max and (block.wire_offset - begin) % ITEM_BYTES[block.dtype] == 0
