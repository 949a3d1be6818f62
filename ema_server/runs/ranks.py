"""Thread-safe store of what is known of the ranks of each sharded trainer: which are missing, and dropped steps."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ema_proto.receiver.assembly import DropReason

RANKS_COUNTED_MAX = 64  # ranks of a run with counts of their own: each of them is a label of a metric
_RANKS_NAMED = 8


@dataclass(frozen=True, slots=True)
class DroppedSteps:
    """Steps that were dropped because of a rank, for one reason; `rank` is None for ranks beyond those counted."""

    rank: int | None
    reason: DropReason
    steps: int


@dataclass(frozen=True, slots=True)
class LastDropped:
    """The last step that was dropped: because of which rank, why, and when (RFC 3339)."""

    step: int
    rank: int
    reason: DropReason
    text: str
    at: str


@dataclass(frozen=True, slots=True)
class RanksStatus:
    """The ranks of a run's trainer. Steps are counted since the server's start, or the run's.

    `present` is 0 without a trainer. `missing` are the lowest of the ranks without which no step counts, 8 at most.
    """

    world: int
    present: int
    missing: tuple[int, ...]
    dropped_steps: int
    dropped: tuple[DroppedSteps, ...]
    last_dropped: LastDropped | None


@dataclass(slots=True)
class _Ranks:
    world: int
    is_streaming: bool = True
    missing: tuple[int, ...] = ()
    counted: set[int] = field(default_factory=set)
    dropped: Counter[tuple[int | None, DropReason]] = field(default_factory=Counter)
    last: LastDropped | None = None

    def status(self) -> RanksStatus:
        order = sorted(self.dropped.items(), key=lambda each: (each[0][0] is None, each[0][0] or 0, each[0][1]))
        return RanksStatus(
            world=self.world,
            present=self.world - len(self.missing) if self.is_streaming else 0,
            missing=self.missing[:_RANKS_NAMED],
            dropped_steps=self.dropped.total(),
            dropped=tuple(DroppedSteps(rank, reason, steps) for (rank, reason), steps in order),
            last_dropped=self.last,
        )


class RanksStore:
    """The ranks of the runs that several ranks have streamed since the server's start. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, _Ranks] = {}

    def get(self, run: str) -> RanksStatus | None:
        """The status of a run's ranks; None if it has had one rank only."""
        with self._lock:
            found = self._runs.get(run)
            return None if found is None else found.status()

    def joined(self, run: str, world: int, *, is_new: bool) -> None:
        """A trainer of so many ranks streams the run from now on; all of them are present."""
        with self._lock:
            if is_new:
                self._runs.pop(run, None)
            found = self._runs.get(run)
            if found is not None:
                found.world, found.is_streaming, found.missing = world, True, ()
            elif world > 1:
                self._runs[run] = _Ranks(world)

    def set_missing(self, run: str, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """These ranks are missing now; returns those that were missing before."""
        with self._lock:
            found = self._runs.get(run)
            if found is None:
                return ()
            before, found.missing = found.missing, ranks
            return before

    def dropped(self, run: str, last: LastDropped) -> None:
        """A step was dropped."""
        with self._lock:
            found = self._runs.get(run)
            if found is None:
                return
            if len(found.counted) < RANKS_COUNTED_MAX:
                found.counted.add(last.rank)
            found.dropped[last.rank if last.rank in found.counted else None, last.reason] += 1
            found.last = last

    def left(self, run: str) -> None:
        """No trainer streams the run."""
        with self._lock:
            found = self._runs.get(run)
            if found is not None:
                found.is_streaming, found.missing = False, ()

    def rename(self, run: str, new_run: str) -> None:
        """A run has another name from now on."""
        with self._lock:
            found = self._runs.pop(run, None)
            if found is not None:
                self._runs[new_run] = found

    def remove(self, run: str) -> None:
        """A run was deleted."""
        with self._lock:
            self._runs.pop(run, None)


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 3, 5` with at most 8 of them named."""
    names = ", ".join(map(str, ranks[:_RANKS_NAMED]))
    more = len(ranks) - _RANKS_NAMED
    return f"rank{'s' * (len(ranks) > 1)} {names}" + (f" and {more} others" if more > 0 else "")
