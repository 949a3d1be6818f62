"""What the server needs of a device that works beside the host: memory, and streams. Interfaces alone.

A stream is work in the order in which it was queued; streams do not wait for each other, and the host for none of them,
but where a mark says so. `cuda` has one such device; tests have one that is late on purpose.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from ema_server.compute.memory import HostMemory


class Mark(Protocol):
    """A place in a stream: it is reached once all that was queued before it is done."""

    def hold(self) -> None:
        """Let what is queued from now on in the thread's current stream wait until it is reached."""

    def wait(self) -> None:
        """Wait until it is reached, on the host."""


class Stream(Protocol):
    """Work on the device in the order in which it was queued."""

    def current(self) -> AbstractContextManager[object]:
        """Around calls of torch: what they begin on the device is queued here, and does not wait for other streams."""

    def mark(self) -> Mark:
        """A mark behind all that is queued by now."""


class Backend(Protocol):
    """What depends on the maker of the device. `allocate` and `free_bytes` raise `MemoryError` where torch says so."""

    @property
    def device(self) -> torch.device:
        """As torch has it."""

    def stream(self) -> Stream:
        """A new stream."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Zeroed memory of the device, uint8, 1-D; zeroed in the current stream."""

    def host(self, nbytes: int) -> HostMemory:
        """Host memory that the device copies from and to without the host's help."""

    def free_bytes(self) -> int:
        """What `allocate` may still have."""

    def trim(self) -> None:
        """Give back to the system what was freed."""

    def describe(self) -> str:
        """The device's name and memory, for people."""
