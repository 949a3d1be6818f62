"""Thread-safe store of the latest status of each run. A status is immutable and is replaced as a whole."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum

_DELETED_MAX = 1000  # names of deleted runs that are remembered, for the answers to requests


class RunState(StrEnum):
    """`active`: a trainer streams it. `waiting`: not finished, and no trainer. `lost`: its trainer has gone silent."""

    ACTIVE = "active"
    WAITING = "waiting"
    LOST = "lost"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The last snapshot that was refused, or the internal error that ended a session.

    Its step, the tensors in question, why, and when (RFC 3339).
    """

    step: int
    tensors: tuple[str, ...]
    text: str
    at: str


@dataclass(frozen=True, slots=True)
class NonFiniteBuffers:
    """Buffers with NaN or Inf in `snapshots` snapshots in a row, of `first_step` to `last_step`.

    Every average but `raw` keeps their last finite value. They are finite again if `last_step` is not the run's step.
    """

    tensors: tuple[str, ...]
    first_step: int
    last_step: int
    snapshots: int


@dataclass(frozen=True, slots=True)
class AverageStatus:
    """One average: updates applied to it, steps that were due and missing, and its step.

    `accumulator` is the dtype of its sum, `wire` for one that is a copy. `decay` is the decay of the last step, and
    `half_life_steps` the steps until half of the average is newer, at this decay: None if the rule has no decay (`raw`,
    a window), if nothing decays after this step, or if the trainer has not given the step units that the rule needs.
    `age_steps` is the mean age of the weights inside; `initial_share` the share of the weights that it began from: the
    first snapshot, the last one before `update_after` ends, or the last `set`. Both are None before its first snapshot,
    as the step is. `warning` says what is wrong with it, None if nothing is.
    """

    name: str
    spec: str
    updates: int
    gap_steps: int
    step: int | None
    accumulator: str
    decay: float | None
    half_life_steps: float | None
    age_steps: float | None
    initial_share: float | None
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run.

    `step` is the last applied one, `published_step` the last durable one, `first_step` the first applied one.
    `applied`, `gap_steps` and `quarantined` count since the run began. `memory_bytes` is what its averages take now.
    `is_current` says whether a trainer has joined it since the server's start. `publish_every_seconds` and
    `publish_every_steps` are how often it is published while it changes, whichever comes first; None if the time or the
    steps do not count, or the run is not in memory.
    """

    run: str
    state: RunState
    created: str
    step: int | None
    published_step: int | None
    first_step: int | None
    every: int
    steps_per_second: float | None
    applied: int
    gap_steps: int
    quarantined: int
    quarantine: Quarantine | None
    nonfinite_buffers: NonFiniteBuffers | None
    exempt: tuple[str, ...]
    tensors: int
    snapshot_bytes: int
    memory_bytes: int
    publish_error: str | None
    averages: tuple[AverageStatus, ...]
    is_current: bool = True
    publish_every_seconds: float | None = None
    publish_every_steps: int | None = None


class StatusStore:
    """The latest status of each run. Only the averager writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[str, RunStatus] = {}
        self._deleted_at: dict[str, str] = {}

    def get(self, run: str) -> RunStatus | None:
        with self._lock:
            return self._statuses.get(run)

    def all(self) -> tuple[RunStatus, ...]:
        """Every status, sorted by the run's name."""
        with self._lock:
            return tuple(status for _, status in sorted(self._statuses.items()))

    def set(self, status: RunStatus) -> None:
        with self._lock:
            self._statuses[status.run] = status
            self._deleted_at.pop(status.run, None)

    def remove(self, run: str) -> None:
        with self._lock:
            self._statuses.pop(run, None)

    def delete(self, run: str, at: str) -> None:
        """Remove the status of a run that was deleted `at` (RFC 3339), and remember that."""
        with self._lock:
            self._statuses.pop(run, None)
            self._deleted_at[run] = at
            if len(self._deleted_at) > _DELETED_MAX:
                del self._deleted_at[next(iter(self._deleted_at))]

    def deleted_at(self, run: str) -> str | None:
        """When a run was deleted by this process; None if it was not, or exists again."""
        with self._lock:
            return self._deleted_at.get(run)
