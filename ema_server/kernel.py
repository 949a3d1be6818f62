"""The averaging arithmetic on blocks: each block of a snapshot updates every average while it is in cache.

Comes in: a snapshot's bytes, blocks of a run's segments, for each average its memory and the snapshot's weight. Goes
out: the same memory, updated. A sink, if there is one, sees each block before it changes. Nothing of a model's size is
allocated, and nothing here knows of threads, runs, steps or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.dtypes import view
from ema_server.layout import Form, Segment, held_dtype

_HALF = frozenset({"BF16", "F16"})


class BlockSink(Protocol):
    """Takes what an average held before the pass. Several threads may call it, for different blocks."""

    def write(self, index: int, begin: int, end: int) -> None:
        """Bytes `begin` to `end` of average number `index` are about to change. Must not raise."""


@dataclass(frozen=True, slots=True)
class Target:
    """One average: its bytes (uint8, 1-D), their form, and the snapshot's weight; None copies the snapshot.

    With `copies_buffers` the blocks that are buffers are copied.
    """

    data: torch.Tensor
    form: Form
    weight: float | None
    copies_buffers: bool = False


class Kernel:
    """One thread's arithmetic, and its scratch block, in which half floats become float32 once for all averages."""

    def __init__(self, block_elements: int) -> None:
        self._scratch = torch.empty(block_elements, dtype=torch.float32)

    def update(
        self,
        blocks: Iterable[Segment],
        snapshot: torch.Tensor,
        targets: Sequence[Target],
        sink: BlockSink | None = None,
    ) -> None:
        """Bring these blocks of `snapshot` (uint8, 1-D, the wire's layout) into every target.

        `average += weight * (snapshot - average)`, in the accumulator's dtype: the form that stays unbiased in float32,
        where `decay * average + (1 - decay) * snapshot` drifts because the two rounded factors do not add up to 1.
        """
        for block in blocks:
            source = view(snapshot, block.dtype, block.wire_offset, block.count)
            wide = self._widened(block, source, targets)
            for index, target in enumerate(targets):
                begin, dtype = block.offset(target.form), held_dtype(target.form, block.dtype)
                if sink is not None:
                    sink.write(index, begin, begin + block.count * ITEM_BYTES[dtype])
                held = view(target.data, dtype, begin, block.count)
                if target.weight is not None and block.averaged and not (block.buffer and target.copies_buffers):
                    held.lerp_(wide, target.weight)
                else:
                    held.copy_(wide if dtype != block.dtype else source)

    def _widened(self, block: Segment, source: torch.Tensor, targets: Sequence[Target]) -> torch.Tensor:
        if block.dtype not in _HALF or all(target.form is Form.WIRE for target in targets):
            return source
        scratch = self._scratch.narrow(0, 0, block.count)
        scratch.copy_(source)
        return scratch


def show(blocks: Iterable[Segment], forms: Sequence[Form], sink: BlockSink) -> None:
    """Show these blocks of every average to `sink` and change nothing."""
    for block in blocks:
        for index, form in enumerate(forms):
            begin = block.offset(form)
            sink.write(index, begin, begin + block.count * ITEM_BYTES[held_dtype(form, block.dtype)])
