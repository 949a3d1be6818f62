"""Averages in memory that the host cannot address: the device behind a `Backend`, as the rest of the server sees it.

Comes in: a backend, which is what of a device depends on its maker. Goes out: a `Device` whose memory is read and
written through one bounce buffer in host memory, made once. Everything on a device is queued in streams, and nothing
waits for anything else unless a mark says so; the waits are here and in `upload`, and nowhere else.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ema_server.compute.backend import Backend
from ema_server.compute.device import Feed
from ema_server.compute.memory import Piece
from ema_server.compute.upload import Upload

# 4 MiB of float32: a few hundred microseconds on the way up, a few dozen for the calls that compute with it.
BLOCK_ELEMENTS = 1 << 20
BOUNCE_BYTES = 8 << 20


class Accelerator:
    """A device with memory of its own; see `device.Device`.

    One thread shares in a pass: it only copies and queues, and copies faster than a snapshot can arrive.

    Args:
        name: as in the settings.
        backend: what depends on the device.
        block_elements: how much is queued at a time.
        bounce_bytes: how much is read or written at a time, a multiple of 8.
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
        """See `Device.allocate`."""
        free_bytes = self._backend.free_bytes()
        if nbytes > free_bytes:
            raise MemoryError(f"{nbytes} bytes of memory on {self.name} are not to be had: {free_bytes} are left")
        return DeviceMemory(self._bounce.allocate(nbytes), self._bounce)

    def feed(self, block_elements: int) -> Feed:
        """Uploads, with buffers of their own."""
        return Upload(self._backend, block_elements)

    def trim(self) -> None:
        """See `Device.trim`."""
        self._backend.trim()

    def describe(self) -> str:
        """See `Device.describe`."""
        return f"{self.name}: {self._backend.describe()}"


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMemory:
    """Bytes on a device; see `memory.Memory`. Several threads may show and fill them, which then take turns."""

    data: torch.Tensor
    _bounce: _Bounce

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.numel()

    def show(self, begin: int, end: int, take: Piece) -> None:
        """See `Memory.show`."""
        self._bounce.down(self.data, begin, end, take)

    def fill(self, begin: int, end: int, give: Piece) -> None:
        """See `Memory.fill`."""
        self._bounce.up(self.data, begin, end, give)


class _Bounce:
    """A buffer in host memory that bytes of the device go through, and the stream that moves them.

    Whatever computes with these bytes is over before, or is queued after: a pass waits for its own end, and shows a
    block before it queues the change.
    """

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self._backend = backend
        self._host = backend.host(nbytes)
        self._stream = backend.stream()
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Zeroed memory, for any stream."""
        with self._stream.current():
            data = self._backend.allocate(nbytes)
        self._stream.mark().wait()
        return data

    def down(self, data: torch.Tensor, begin: int, end: int, take: Piece) -> None:
        """Bytes of `data` to the host, piece by piece."""
        for first in range(begin, end, self._host.nbytes):
            count = min(self._host.nbytes, end - first)
            with self._lock:
                with self._stream.current():
                    self._host.data.narrow(0, 0, count).copy_(data.narrow(0, first, count), non_blocking=True)
                self._stream.mark().wait()
                take(self._host.view[:count], first)

    def up(self, data: torch.Tensor, begin: int, end: int, give: Piece) -> None:
        """Bytes from the host into `data`, piece by piece."""
        for first in range(begin, end, self._host.nbytes):
            count = min(self._host.nbytes, end - first)
            with self._lock:
                give(self._host.view[:count], first)
                with self._stream.current():
                    data.narrow(0, first, count).copy_(self._host.data.narrow(0, 0, count), non_blocking=True)
                self._stream.mark().wait()
