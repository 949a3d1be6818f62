"""The averaging arithmetic on blocks: each block of a snapshot updates every average while it is in cache.

Comes in: blocks of a run's segments, each with its elements of the snapshot, for each average its memory and the
snapshot's weight. Goes out: the same memory, updated. A sink, if there is one, sees each block before it changes.
Nothing of a model's size is allocated, and nothing here knows of threads, runs, steps or files, nor on which device the
tensors are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.dtypes import TORCH_DTYPES, view
from ema_server.layout import Form, Segment, held_dtype


class BlockSink(Protocol):
    """Takes what an average held before the pass. Several threads may call it, for different blocks."""

    def write(self, index: int, begin: int, end: int) -> None:
        """Bytes `begin` to `end` of average number `index` are about to change. Must not raise."""


@dataclass(frozen=True, slots=True)
class Target:
    """One average: its bytes (uint8, 1-D), their form, and the snapshot's weight; None copies it all, 0 leaves all.

    `number` is that of its bit in a segment's mask; blocks that it does not average are copied.
    """

    data: torch.Tensor
    form: Form
    weight: float | None
    number: int = 0


class Kernel:
    """One thread's arithmetic, and scratch blocks, in which a snapshot's floats become wider once for all averages."""

    def __init__(self, block_elements: int, device: torch.device) -> None:
        self._scratch = {
            dtype: torch.empty(block_elements, dtype=TORCH_DTYPES[dtype], device=device) for dtype in ("F32", "F64")
        }

    def update(
        self,
        blocks: Iterable[tuple[Segment, torch.Tensor]],
        targets: Sequence[Target],
        sink: BlockSink | None = None,
    ) -> None:
        """Bring these blocks, each with its elements of the snapshot (1-D, the wire's dtype), into every target.

        `average += weight * (snapshot - average)`, in the accumulator's dtype: the form that stays unbiased in float32,
        where `decay * average + (1 - decay) * snapshot` drifts because the two rounded factors do not add up to 1.
        """
        for block, source in blocks:
            sources = {block.dtype: source}
            for index, target in enumerate(targets):
                begin, dtype = block.offset(target.form), held_dtype(target.form, block.dtype)
                if sink is not None:
                    sink.write(index, begin, begin + block.count * ITEM_BYTES[dtype])
                if target.weight == 0.0:
                    continue
                held = view(target.data, dtype, begin, block.count)
                if target.weight is not None and block.averaged >> target.number & 1:
                    held.lerp_(self._widened(sources, block, dtype), target.weight)
                else:
                    held.copy_(sources[block.dtype])

    def _widened(self, sources: dict[str, torch.Tensor], block: Segment, dtype: str) -> torch.Tensor:
        """The block's elements as `dtype`, converted at its first use."""
        if dtype not in sources:
            sources[dtype] = self._scratch[dtype].narrow(0, 0, block.count).copy_(sources[block.dtype])
        return sources[dtype]


def show(blocks: Iterable[Segment], forms: Sequence[Form], sink: BlockSink) -> None:
    """Show these blocks of every average to `sink` and change nothing."""
    for block in blocks:
        for index, form in enumerate(forms):
            begin = block.offset(form)
            sink.write(index, begin, begin + block.count * ITEM_BYTES[held_dtype(form, block.dtype)])
