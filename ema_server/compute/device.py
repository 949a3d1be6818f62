"""Where averages are kept and computed: the interface that the rest of the server uses, and the host as one device.

`accelerator` has the other kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from ema_server.compute.memory import HostMemory, Memory, allocate, available_bytes
from ema_server.tensors.dtypes import view
from ema_server.tensors.layout import Segment

# 2 MiB of float32: a block's work dwarfs the Python around it, and the block stays in cache for all averages.
BLOCK_ELEMENTS = 512 << 10

_SPARE_SHARE = 8  # spare memory is at most one part in this many of what is available

WORKERS_MAX = 8  # memory is saturated by then, and the interpreter lock is not


class Feed(Protocol):
    """Brings a snapshot to the device, for one thread."""

    def turn(self) -> AbstractContextManager[object]:
        """A context for one pass of the thread: work that begins inside is done when it exits."""

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Each block with its elements on the device: 1-D, the wire's dtype, valid until the next block is requested.

        Args:
            snapshot: uint8, 1-D, in host memory, the wire's layout.
            blocks: of at most `block_elements` elements, by rising offset.
        """


class Device(Protocol):
    """A place where averages are kept."""

    @property
    def name(self) -> str:
        """As in the settings: `cpu`, `cuda:1`."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def workers(self) -> int:
        """The number of threads that share a pass."""

    @property
    def block_elements(self) -> int:
        """The number of elements that each of them takes at a time."""

    def allocate(self, nbytes: int) -> Memory:
        """Zeroed memory.

        Raises:
            MemoryError: the device has not enough; the text says how much is left.
        """

    def spare(self, nbytes: int) -> Memory | None:
        """Memory that only makes passes faster; None where there is too little for that, or passes cannot use it."""

    def feed(self, block_elements: int) -> Feed:
        """A feed for one thread."""

    def trim(self) -> None:
        """Return freed memory to the system."""

    def describe(self) -> str:
        """The device's name and free memory, for display.

        Raises:
            RuntimeError: the device does not answer.
        """


class Host:
    """Memory and cores of this machine."""

    name = "cpu"
    torch_device = torch.device("cpu")
    block_elements = BLOCK_ELEMENTS

    @property
    def workers(self) -> int:
        return min(torch.get_num_threads(), WORKERS_MAX)

    def allocate(self, nbytes: int) -> HostMemory:
        return allocate(nbytes, touch=True)

    def spare(self, nbytes: int) -> HostMemory | None:
        """A part of what is available that leaves enough for others, and for the runs to come."""
        available = available_bytes()
        if available is None or nbytes * _SPARE_SHARE > available:
            return None
        try:
            return allocate(nbytes)
        except MemoryError:  # a limit of the process
            return None

    def feed(self, block_elements: int) -> Feed:
        return _InPlace()

    def trim(self) -> None:
        """Nothing to do: unmapped memory is the system's."""

    def describe(self) -> str:
        return "cpu: this machine's memory"


class _InPlace:
    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        for block in blocks:
            yield block, view(snapshot, block.dtype, block.wire_offset, block.count)


HOST = Host()
