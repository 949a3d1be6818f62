"""Host memory that snapshots arrive in: a run's slots, each exactly one snapshot long, made when a session joins.

Pages are mapped as the first snapshot arrives: touching them all at joining would hold up other runs' snapshots.
"""

from __future__ import annotations

from ema_server.compute.memory import allocate


class Slot:
    """One slot: its bytes as a tensor (uint8, 1-D) and as a memoryview of the same memory, and what arrived unclean.

    Raises:
        MemoryError: the system has not so much memory.
    """

    __slots__ = ("_attempt", "not_finite", "tensor", "view")

    def __init__(self, nbytes: int) -> None:
        memory = allocate(nbytes)
        self.tensor, self.view = memory.data, memory.view
        self.not_finite: set[str] = set()
        self._attempt = 0

    def note(self, attempt: int, not_finite: tuple[str, ...]) -> None:
        """Remember in which tensors the chunks of this attempt had NaN or Inf; another attempt starts clean."""
        if attempt != self._attempt:
            self._attempt = attempt
            self.not_finite.clear()
        self.not_finite.update(not_finite)
