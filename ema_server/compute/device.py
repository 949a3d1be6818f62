"""Where averages are kept and computed, as the rest of the server sees it: memory, and a way to bring snapshots there.

`Host` is the machine's own memory and cores. What else there is, `accelerator` makes; who asks for memory or for blocks
does not know the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from ema_server.compute.memory import HostMemory, Memory, allocate
from ema_server.tensors.dtypes import view
from ema_server.tensors.layout import Segment

# 2 MiB of float32: a block's work dwarfs the Python around it, and the block stays in cache for all averages.
BLOCK_ELEMENTS = 512 << 10

WORKERS_MAX = 8  # memory is saturated by then, and Python's lock is not


class Feed(Protocol):
    """Brings a snapshot to the device, for one thread."""

    def turn(self) -> AbstractContextManager[object]:
        """Around one pass of the thread: what it begins inside is done when it leaves."""

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Each block with its elements on the device: 1-D, the wire's dtype, valid until the next block is asked for.

        Args:
            snapshot: uint8, 1-D, in host memory, the wire's layout.
            blocks: of at most `block_elements` elements, by rising offsets.
        """


class Device(Protocol):
    """What averages are kept on."""

    @property
    def name(self) -> str:
        """As in the settings: `cpu`, `cuda:1`."""

    @property
    def torch_device(self) -> torch.device:
        """As torch has it."""

    @property
    def workers(self) -> int:
        """How many threads share a pass."""

    @property
    def block_elements(self) -> int:
        """How much each of them takes at a time."""

    def allocate(self, nbytes: int) -> Memory:
        """Zeroed memory, taken at once.

        Raises:
            MemoryError: the device has not so much; the text says how much is left.
        """

    def feed(self, block_elements: int) -> Feed:
        """What one thread takes the blocks of a snapshot from."""

    def trim(self) -> None:
        """Give back to the system what was freed."""

    def describe(self) -> str:
        """Its name, and what it has left, for people.

        Raises:
            RuntimeError: it does not answer.
        """


class Host:
    """Memory and cores of this machine."""

    name = "cpu"
    torch_device = torch.device("cpu")
    block_elements = BLOCK_ELEMENTS

    @property
    def workers(self) -> int:
        """As many as torch would use, as far as that helps."""
        return min(torch.get_num_threads(), WORKERS_MAX)

    def allocate(self, nbytes: int) -> HostMemory:
        """See `Device.allocate`."""
        return allocate(nbytes, touch=True)

    def feed(self, block_elements: int) -> Feed:
        """A view of the snapshot where it is."""
        return _InPlace()

    def trim(self) -> None:
        """Nothing: what is freed is the system's again."""

    def describe(self) -> str:
        """See `Device.describe`."""
        return "cpu: this machine's memory"


class _InPlace:
    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        for block in blocks:
            yield block, view(snapshot, block.dtype, block.wire_offset, block.count)


HOST = Host()
