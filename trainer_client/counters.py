"""Counts and times of a client's calls, as the training thread saw them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any


class Skip(StrEnum):
    """Why a snapshot that was due did not leave."""

    BUSY = "busy"  # every slot was still on its way
    OFFLINE = "offline"  # no connection to the server
    STOPPED = "stopped"  # the server has refused the run for good
    REPEATED = "repeated"  # its step is not above the last one
    CAPTURING = "capturing"  # the step was recorded into a CUDA graph, not taken
    CHANGED = "changed"  # the model has changed since the run was joined, see `on_change`
    GATHERED = "gathered"  # FSDP held whole parameters for a forward pass
    ERROR = "error"  # something failed on this side


@dataclass(slots=True)
class Counters:
    """Totals since the client was made. As a context manager it times how long the training loop is in our code.

    `torn` and `failed` are written where copies end (see `transfers`), the rest by the training thread.
    """

    skipped: Counter[Skip] = field(default_factory=Counter)
    torn: int = 0
    failed: int = 0
    blocked_s_total: float = 0.0
    blocked_s_max: float = 0.0
    _entered: float = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        blocked_s = time.perf_counter() - self._entered
        self.blocked_s_total += blocked_s
        self.blocked_s_max = max(self.blocked_s_max, blocked_s)

    def add(self, other: Counters) -> None:
        """Go on from the totals of `other`."""
        self.skipped.update(other.skipped)
        self.torn += other.torn
        self.failed += other.failed
        self.blocked_s_total += other.blocked_s_total
        self.blocked_s_max = max(self.blocked_s_max, other.blocked_s_max)

    def to_json(self) -> dict[str, Any]:
        """The totals as plain values."""
        skipped = self.skipped + Counter({Skip.ERROR: self.failed})
        return {
            "skipped": {reason.value: skipped[reason] for reason in Skip},
            "torn": self.torn,
            "blocked_s_total": self.blocked_s_total,
            "blocked_s_max": self.blocked_s_max,
        }
