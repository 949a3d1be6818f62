"""Averages in memory that the host cannot address, on a device behind a `Backend`.

The device's memory is read and written through a bounce buffer in host memory, and `upload` brings snapshots there.
Work on the device is queued in streams; all waiting between streams, and of the host for a stream, is in these files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import torch

from ema_server.compute.backend import Backend, Mark
from ema_server.compute.device import HOST, Feed
from ema_server.compute.memory import HostMemory, Piece
from ema_server.compute.upload import Copiers, Upload

# 4 MiB of float32: a few hundred microseconds to move, a few dozen for the calls that compute with it.
BLOCK_ELEMENTS = 1 << 20
BOUNCE_BYTES = 4 << 20

_HALVES = 2


class Accelerator:
    """A `Device` with memory of its own.

    One thread does a pass: it queues work, `block_elements` at a time, while `copiers` (a thread for each core, up
    to 8) bring the snapshot to pinned memory. `bounce_bytes`, a multiple of 16, are the bounce buffer's.
    """

    workers = 1

    def __init__(
        self,
        name: str,
        backend: Backend,
        block_elements: int = BLOCK_ELEMENTS,
        bounce_bytes: int = BOUNCE_BYTES,
        copiers: Copiers | None = None,
    ) -> None:
        self.name = name
        self.block_elements = block_elements
        self.torch_device = backend.device
        self._backend = backend
        self._bounce = _Bounce(backend, bounce_bytes)
        self._copiers = Copiers(HOST.workers) if copiers is None else copiers

    def allocate(self, nbytes: int) -> DeviceMemory:
        free_bytes = self._backend.free_bytes()
        if nbytes > free_bytes:
            raise MemoryError(f"cannot allocate {nbytes} bytes on {self.name}: only {free_bytes} are available")
        return DeviceMemory(self._bounce.allocate(nbytes), self._bounce)

    def spare(self, nbytes: int) -> None:
        """None: a snapshot is checked in host memory, before it is moved."""

    def feed(self, block_elements: int) -> Feed:
        return Upload(self._backend, block_elements, self._copiers)

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


@dataclass(slots=True)
class _Half:
    """Half of the bounce buffer. `mark` is reached when the device has read or written what was requested last."""

    host: HostMemory
    mark: Mark


class _Bounce:
    """A buffer in host memory for copies from and to the device, and the stream that makes them.

    The device copies one half while the host reads or writes the other. The stream needs no mark against computing
    streams: a pass waits for its own end, and shows a block before it queues the change of the block.
    """

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self._backend = backend
        self._stream = backend.stream()
        self._nbytes = nbytes // _HALVES
        self._halves = tuple(_Half(backend.host(self._nbytes), self._stream.mark()) for _ in range(_HALVES))
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Zeroed memory that every stream may use."""
        with self._stream.current():
            data = self._backend.allocate(nbytes)
        self._stream.mark().wait()
        return data

    def down(self, data: torch.Tensor, begin: int, end: int, take: Piece) -> None:
        requested: deque[tuple[_Half, int, int]] = deque()

        def deliver() -> None:
            half, first, count = requested.popleft()
            half.mark.wait()
            take(half.host.view[:count], first)

        with self._lock, self._stream.current():
            for half, first, count in self._pieces(begin, end):
                half.host.data.narrow(0, 0, count).copy_(data.narrow(0, first, count), non_blocking=True)
                half.mark = self._stream.mark()
                requested.append((half, first, count))
                if len(requested) == _HALVES:
                    deliver()
            while requested:
                deliver()

    def up(self, data: torch.Tensor, begin: int, end: int, give: Piece) -> None:
        with self._lock, self._stream.current():
            for half, first, count in self._pieces(begin, end):
                half.mark.wait()
                give(half.host.view[:count], first)
                data.narrow(0, first, count).copy_(half.host.data.narrow(0, 0, count), non_blocking=True)
                half.mark = self._stream.mark()
            self._stream.mark().wait()

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[_Half, int, int]]:
        """The halves in turn, each with the first byte that it takes and their number."""
        halves = cycle(self._halves)
        for first in range(begin, end, self._nbytes):
            yield next(halves), first, min(self._nbytes, end - first)
