"""Leases and validations as values. A lease is a worker's claim to one version for one task, until it expires."""

from __future__ import annotations

from dataclasses import dataclass, field

from ema_server.evaluation.metric_store import Subject

LEASE_S = 30.0  # a killed worker's version waits no longer; a worker beats three times in it


@dataclass(frozen=True, slots=True)
class Ask:
    """What a worker accepts: versions of one run (None: of all), of these averages (empty: of all).

    With `version`, the id of one, it accepts that version alone.
    """

    worker: str
    task: str
    run: str | None = None
    averages: tuple[str, ...] = ()
    lease_s: float = LEASE_S
    version: str | None = None

    def covers(self, subject: Subject, task: str) -> bool:
        """Whether this version may go to this worker."""
        return (
            task == self.task
            and self.run in (None, subject.run)
            and (not self.averages or subject.average in self.averages)
            and self.version in (None, subject.version)
        )


@dataclass(frozen=True, slots=True)
class Due:
    """What a worker may evaluate without a request.

    `runs`: whose versions it may take. `skip`: ids of versions that it has failed on. `sets`: the versions to evaluate,
    grouped; a group is begun only when the groups before it, and those begun earlier, have no free version left.
    """

    runs: tuple[str, ...]
    skip: frozenset[str]
    sets: tuple[tuple[Subject, ...], ...]


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's claim to one version for one task, until `expires` (the server's clock, seconds since the epoch).

    Every heartbeat extends it by `lease_s`.
    """

    id: str
    subject: Subject
    task: str
    worker: str
    lease_s: float
    expires: float


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease, or none; and how many due versions other workers have."""

    lease: Lease | None
    held: int


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of an evaluation: finite metrics and why others are missing, or the error that prevented them."""

    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    samples: int | None = None
    seconds: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validation:
    """A requested validation: `leased_to` is set while it runs; `finding`, `worker` and `at` once it has ended."""

    id: str
    subject: Subject
    task: str
    created: str
    finding: Finding | None
    worker: str | None
    at: str | None
    leased_to: str | None
