"""What the server needs of a device that works beside the host: memory, and streams. Interfaces only.

A stream runs work in the order in which it was queued. Streams do not wait for each other, nor the host for them,
unless a mark says so. `cuda` implements these for CUDA devices; the tests have backends that are late on purpose.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ema_server.compute.memory import HostMemory


class Mark(Protocol):
    """A place in a stream, reached once all work that was queued before it is done."""

    def hold(self) -> None:
        """Make work that is queued later in the thread's current stream wait for this mark."""

    def wait(self) -> None:
        """Block the host until the mark is reached."""


class Stream(Protocol):
    """A queue of work on the device."""

    def current(self) -> AbstractContextManager[object]:
        """A context in which torch queues its work on the device here."""

    def mark(self) -> Mark:
        """A mark behind all work that is queued by now."""


class Backend(Protocol):
    """A device. `allocate` and `free_bytes` raise `MemoryError` where torch reports too little memory."""

    @property
    def device(self) -> torch.device: ...

    def stream(self) -> Stream:
        """A new stream."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, uint8, 1-D, zeroed in the current stream."""

    def host(self, nbytes: int) -> HostMemory:
        """Host memory that the device copies from and to by itself."""

    def free_bytes(self) -> int:
        """How much `allocate` can still provide."""

    def trim(self) -> None:
        """Return freed memory to the system."""

    def describe(self) -> str:
        """The device's name and memory, for display."""
