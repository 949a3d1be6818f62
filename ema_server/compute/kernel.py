"""The averaging arithmetic on blocks: each block of a snapshot updates every average while it is in cache.

A sink, if there is one, sees each block before it changes. Nothing of a model's size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ema_proto.dtypes import ITEM_BYTES
from ema_server.compute.arithmetic import Arithmetic, Elements, Moved, Weighted
from ema_server.tensors.dtypes import view
from ema_server.tensors.finite import FiniteCheck
from ema_server.tensors.layout import Form, Segment, held_dtype


class BlockSink(Protocol):
    """Receives the content of averages before it changes. Several threads may call it, for different blocks."""

    def write(self, index: int, begin: int, end: int) -> None:
        """Bytes `begin` to `end` of average number `index` are about to change. Must not raise."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a target is computed from: bytes (uint8, 1-D), their form, and their weight. None is the snapshot."""

    data: torch.Tensor | None
    form: Form
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """One average: its bytes (uint8, 1-D), their form, and the snapshot's weight.

    Weight None copies the whole snapshot, 0 leaves the average unchanged. Otherwise blocks whose mask lacks bit
    `number` are copied. With a `mix`, the blocks with that bit are computed from these sources: each is blended into
    the ones before it with its weight, the first with 1. Targets take effect in their order, those with a weight last.
    """

    data: torch.Tensor
    form: Form
    weight: float | None
    number: int = 0
    mix: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """A target without a `mix`, and where its updated bytes are written; None leaves it as it is (weight 0)."""

    target: Target
    into: torch.Tensor | None


class Kernel:
    """One thread's pass over blocks, with scratch in which a block's floats are widened once for all averages."""

    def __init__(self, block_elements: int, device: torch.device, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        wide = (torch.float32, torch.float64)
        self._scratch = {dtype: torch.empty(block_elements, dtype=dtype, device=device) for dtype in wide}

    def update(
        self,
        blocks: Iterable[tuple[Segment, torch.Tensor]],
        targets: Sequence[Target],
        sink: BlockSink | None = None,
    ) -> None:
        """Apply these blocks, each with its elements of the snapshot (1-D, the wire's dtype), to every target."""
        for block, source in blocks:
            averaged: list[Weighted] = []
            for index, target in enumerate(targets):
                begin, dtype = block.offset(target.form), held_dtype(target.form, block.dtype)
                if sink is not None:
                    sink.write(index, begin, begin + block.count * ITEM_BYTES[dtype])
                if target.weight == 0.0:
                    continue
                held = view(target.data, dtype, begin, block.count)
                is_averaged = bool(block.averaged >> target.number & 1)
                if is_averaged and target.mix:
                    self._blend(held, block, source, target.mix)
                elif not is_averaged or target.weight is None:
                    held.copy_(source)
                else:
                    averaged.append((held, target.weight))
            self._arithmetic.lerp(Elements(source, self._scratch), averaged)

    def move(
        self,
        block: Segment,
        snapshot: torch.Tensor,
        moves: Sequence[Move],
        check: FiniteCheck,
        sink: BlockSink | None = None,
    ) -> bool:
        """Write one block of every target, updated, to where it moves; returns whether the snapshot's block is finite.

        Args:
            block: of at most the kernel's number of elements.
            snapshot: uint8, 1-D, in host memory, as the targets are.
            moves: what to write where. The targets do not change.
            check: says which tensors are to be finite. Those that an average averages are among them.
            sink: sees each target's block.
        """
        source, moved = view(snapshot, block.dtype, block.wire_offset, block.count), list[Moved]()
        for index, move in enumerate(moves):
            target = move.target
            begin, dtype = block.offset(target.form), held_dtype(target.form, block.dtype)
            if sink is not None:
                sink.write(index, begin, begin + block.count * ITEM_BYTES[dtype])
            if move.into is None:
                continue
            new = view(move.into, dtype, begin, block.count)
            if target.weight is None or not block.averaged >> target.number & 1:
                new.copy_(source)
            else:
                moved.append((view(target.data, dtype, begin, block.count), new, target.weight))
        if moved:
            return self._arithmetic.lerp_into(Elements(source, self._scratch), moved)
        return not check.check(block.wire_offset, snapshot[block.wire_offset : block.wire_end])

    def _blend(self, held: torch.Tensor, block: Segment, snapshot: torch.Tensor, mix: Sequence[Source]) -> None:
        for index, source in enumerate(mix):
            elements = Elements(_elements(source, block, snapshot), self._scratch)
            if index == 0:
                held.copy_(elements.source)
            else:
                self._arithmetic.lerp(elements, [(held, source.weight)])


def _elements(source: Source, block: Segment, snapshot: torch.Tensor) -> torch.Tensor:
    if source.data is None:
        return snapshot
    return view(source.data, held_dtype(source.form, block.dtype), block.offset(source.form), block.count)


def show(blocks: Iterable[Segment], forms: Sequence[Form], sink: BlockSink) -> None:
    """Show these blocks of every average to `sink` without a change."""
    for block in blocks:
        for index, form in enumerate(forms):
            begin = block.offset(form)
            sink.write(index, begin, begin + block.count * ITEM_BYTES[held_dtype(form, block.dtype)])
