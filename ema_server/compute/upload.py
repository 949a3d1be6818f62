"""Brings a snapshot from host memory to a device, batch by batch, in two stages.

While the device computes with one batch, the next is moved, and threads copy the one after it to pinned memory: a
single thread copies more slowly than the bus moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.compute.backend import Backend, Mark, Stream
from ema_server.tensors.dtypes import view
from ema_server.tensors.layout import Segment

_STAGES = 2
_BLOCKS = 2  # of the widest dtype in a stage: fewer hand-overs between threads
_ITEM_BYTES_MAX = max(ITEM_BYTES.values())


class Copiers:
    """Threads that copy within host memory, for all feeds of a device. They end with this object."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "copying", initializer=torch.set_num_threads, initargs=(1,))

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark, nbytes_max: int) -> list[Future[None]]:
        """Copy bytes once `after` is reached, in equal parts of what `nbytes_max` bytes would be; one part at once."""

        def copy(begin: int, end: int) -> None:
            after.wait()
            target[begin:end].copy_(source[begin:end])

        count, part = len(source), max(1, nbytes_max // self._threads)
        if count <= part:
            copy(0, count)
            return []
        return [self._pool.submit(copy, begin, min(begin + part, count)) for begin in range(0, count, part)]


class _Stage:
    """A buffer in host memory that the device copies from by itself, and one on the device.

    `filling` is done when the host's buffer is full, `moved` is reached when it may be written again, and `used` when
    the device's may be.
    """

    __slots__ = ("data", "filling", "host", "moved", "used")

    def __init__(self, backend: Backend, nbytes: int, moving: Stream, computing: Stream) -> None:
        with computing.current():
            self.data = backend.allocate(nbytes)
        self.host = backend.host(nbytes).data
        self.filling: list[Future[None]] = []
        self.moved, self.used = moving.mark(), computing.mark()


class Upload:
    """The `Feed` of one thread; no block has more than `block_elements`."""

    def __init__(self, backend: Backend, block_elements: int, copiers: Copiers) -> None:
        self._nbytes = block_elements * _ITEM_BYTES_MAX * _BLOCKS
        self._copiers = copiers
        self._moving, self._computing = backend.stream(), backend.stream()
        self._stages = tuple(_Stage(backend, self._nbytes, self._moving, self._computing) for _ in range(_STAGES))
        self._next = cycle(self._stages)

    @contextmanager
    def turn(self) -> Iterator[None]:
        try:
            with self._computing.current():
                yield
        finally:
            for stage in self._stages:
                for part in stage.filling:  # after a failure one may still read the snapshot
                    part.exception()
            self._computing.mark().wait()

    def blocks(self, snapshot: torch.Tensor, blocks: Iterable[Segment]) -> Iterator[tuple[Segment, torch.Tensor]]:
        batches = _batches(blocks, self._nbytes)
        ahead = self._fill(snapshot, batches)
        while ahead is not None:
            stage, batch = ahead
            begin = batch[0].wire_offset
            self._move(stage, batch[-1].wire_end - begin)
            ahead = self._fill(snapshot, batches)
            stage.moved.hold()
            for block in batch:
                yield block, view(stage.data, block.dtype, block.wire_offset - begin, block.count)
            stage.used = self._computing.mark()

    def _fill(self, snapshot: torch.Tensor, batches: Iterator[list[Segment]]) -> tuple[_Stage, list[Segment]] | None:
        """Have the next batch copied to the host's buffer of the next stage."""
        batch = next(batches, None)
        if batch is None:
            return None
        stage, source = next(self._next), snapshot[batch[0].wire_offset : batch[-1].wire_end]
        stage.filling = self._copiers.copy(stage.host, source, stage.moved, self._nbytes)
        return stage, batch

    def _move(self, stage: _Stage, count: int) -> None:
        for part in stage.filling:
            part.result()
        with self._moving.current():
            stage.used.hold()
            stage.data.narrow(0, 0, count).copy_(stage.host.narrow(0, 0, count), non_blocking=True)
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
