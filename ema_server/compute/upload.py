"""Brings a snapshot to a device, batch by batch, while the batches before are still being computed with.

Comes in: the snapshot in host memory, and blocks. Goes out: the blocks, each with its elements on the device. There are
two stages, each with a buffer on either side, made once: while one is filled, the other is moved or read. It knows
nothing of averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.compute.backend import Backend, Stream
from ema_server.tensors.dtypes import view
from ema_server.tensors.layout import Segment

_STAGES = 2
_ITEM_BYTES_MAX = max(ITEM_BYTES.values())


class _Stage:
    """A buffer in host memory that the device can copy from by itself, and one on the device.

    `moved` is reached when the former may be written again, `used` when the latter may be.
    """

    __slots__ = ("data", "host", "moved", "used")

    def __init__(self, backend: Backend, nbytes: int, moving: Stream, computing: Stream) -> None:
        with computing.current():
            self.data = backend.allocate(nbytes)
        self.host = backend.host(nbytes).data
        self.moved, self.used = moving.mark(), computing.mark()


class Upload:
    """The way of one thread's blocks; see `device.Feed`.

    Args:
        backend: what depends on the device.
        block_elements: the longest block.
    """

    def __init__(self, backend: Backend, block_elements: int) -> None:
        self._nbytes = block_elements * _ITEM_BYTES_MAX
        self._moving, self._computing = backend.stream(), backend.stream()
        stages = (_Stage(backend, self._nbytes, self._moving, self._computing) for _ in range(_STAGES))
        self._stages = cycle(tuple(stages))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Feed.turn`."""
        try:
            with self._computing.current():
                yield
        finally:
            self._computing.mark().wait()

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        """See `Feed.blocks`."""
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
    """Blocks that lie within `nbytes_max` bytes of the snapshot, so that many small ones are moved at once.

    They begin at a multiple of their item size after the first one.
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
