"""Host memory that snapshots arrive in: a run's slots, each exactly one snapshot long, made when a session joins.

Anonymous mappings: exact in size, zero pages until used, and given back to the kernel when the last view goes.
"""

from __future__ import annotations

import mmap

import torch


class Slot:
    """One slot: its bytes as a tensor (uint8, 1-D) and as a memoryview of the same memory, and what arrived unclean."""

    __slots__ = ("_attempt", "not_finite", "tensor", "view")

    def __init__(self, nbytes: int) -> None:
        memory = mmap.mmap(-1, nbytes)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.view = memoryview(memory)
        self.not_finite: set[str] = set()
        self._attempt = 0

    def note(self, attempt: int, not_finite: tuple[str, ...]) -> None:
        """Remember in which tensors the chunks of this attempt had NaN or Inf; another attempt starts clean."""
        if attempt != self._attempt:
            self._attempt = attempt
            self.not_finite.clear()
        self.not_finite.update(not_finite)
