"""Computes averages of checkpoints, block by block over all of them, with the server's kernel.

A block of each average is complete before the next block begins, so memory does not depend on the size of the model or
of a tensor: one block for each average, and one for each thread that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.checkpoints.errors import CheckpointError
from ema_server.checkpoints.plan import Work
from ema_server.checkpoints.source import OpenCheckpoint
from ema_server.checkpoints.weights import Weighing
from ema_server.compute.arithmetic import Arithmetic
from ema_server.compute.device import BLOCK_ELEMENTS
from ema_server.compute.kernel import Kernel, Target
from ema_server.compute.memory import HostMemory, host_memory
from ema_server.tensors.dtypes import view
from ema_server.tensors.finite import is_finite
from ema_server.tensors.layout import Form, Segment, held_dtype
from ema_server.tensors.selection import form_of

_READERS = 8  # checkpoints that are read, hashed and checked at the same time
_ITEM_BYTES_MAX = max(ITEM_BYTES.values())


class Sink(Protocol):
    """Receives the averages."""

    def write(self, average: int, name: str, start: int, values: torch.Tensor) -> None:
        """Elements of a tensor from number `start` on: 1-D, valid during the call only."""


def combine(
    checkpoints: Mapping[int, OpenCheckpoint],
    weighings: Sequence[Weighing],
    work: Sequence[Work],
    sink: Sink,
    arithmetic: Arithmetic,
    on_read: Callable[[int], None],
) -> None:
    """Compute every average of these tensors.

    Args:
        checkpoints: by their numbers in `work`.
        weighings: of the averages.
        work: the tensors.
        sink: receives the averages, in blocks.
        arithmetic: the averaging kernel's.
        on_read: is called with the number of bytes that were read.

    Raises:
        CheckpointError: a tensor has NaN or Inf, or a file became shorter.
        OSError: a file cannot be read, or an average not be written.
    """
    forms = [form_of(weighing.rule) for weighing in weighings]
    kernel = Kernel(BLOCK_ELEMENTS, torch.device("cpu"), arithmetic)
    held = [_block_memory().data for _ in weighings]
    with closing(_Reader(checkpoints, on_read)) as reader:
        for one, start, block in _blocks(work):
            for weights, source in reader.read(one, start, block.count):
                kernel.update([(block, source)], _targets(held, forms, weights))
            for number, form in enumerate(forms):
                values = view(held[number], held_dtype(form, block.dtype), 0, block.count)
                sink.write(number, one.stored.name, start, values)


def _blocks(work: Iterable[Work]) -> Iterator[tuple[Work, int, Segment]]:
    """Each tensor in blocks: the number of the first element, and the block as the kernel sees it."""
    for one in work:
        for start in range(0, one.stored.elements, BLOCK_ELEMENTS):
            count = min(BLOCK_ELEMENTS, one.stored.elements - start)
            yield one, start, Segment(one.stored.dtype, one.averaged, count, 0, 0, 0)


def _targets(held: Sequence[torch.Tensor], forms: Sequence[Form], weights: Sequence[float | None]) -> Sequence[Target]:
    return [
        Target(data, form, weight, number)
        for number, (data, form, weight) in enumerate(zip(held, forms, weights, strict=True))
    ]


class _Reader:
    """Reads a block of several checkpoints at the same time."""

    def __init__(self, checkpoints: Mapping[int, OpenCheckpoint], on_read: Callable[[int], None]) -> None:
        self._checkpoints = checkpoints
        self._on_read = on_read
        self._buffers = [_block_memory() for _ in range(min(_READERS, len(checkpoints)))]
        self._pool = ThreadPoolExecutor(len(self._buffers), "checkpoints")

    def read(self, work: Work, start: int, count: int) -> Iterator[tuple[tuple[float | None, ...], torch.Tensor]]:
        """The weights of each checkpoint that is read, with its block, which is valid until the next is requested."""
        at_once = len(self._buffers)
        for first in range(0, len(work.weights), at_once):
            group = work.weights[first : first + at_once]
            reads = [
                self._pool.submit(self._read, buffer, self._checkpoints[number], work, start, count)
                for buffer, (number, _) in zip(self._buffers, group, strict=False)
            ]
            for read, (_, weights) in zip(reads, group, strict=True):
                yield weights, read.result()
                self._on_read(count * ITEM_BYTES[work.stored.dtype])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def _read(buffer: HostMemory, checkpoint: OpenCheckpoint, work: Work, start: int, count: int) -> torch.Tensor:
        located = checkpoint.tensors[work.stored.name]
        item_bytes = ITEM_BYTES[work.stored.dtype]
        located.file.read(buffer.view[: count * item_bytes], located.stored.offset + start * item_bytes)
        values = view(buffer.data, work.stored.dtype, 0, count)
        if work.averaged and not is_finite(values):
            raise CheckpointError(
                f"tensor {work.stored.name!r} of {located.file.path} has NaN or Inf: leave this checkpoint out, or the "
                "tensor with exclude= if it is not meant to be finite"
            )
        return values


def _block_memory() -> HostMemory:
    return host_memory(torch.empty(BLOCK_ELEMENTS * _ITEM_BYTES_MAX, dtype=torch.uint8))
