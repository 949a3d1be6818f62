"""The JSON that several resources share, as types."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=200)]
DropReason = Literal["skipped", "passed", "left", "lost", "silent", "late", "rewound"]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Out(BaseModel):
    """A part of a response, read from the attributes of a value."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class FileOut(Out):
    """One file of a version; `sha256` is also its strong ETag."""

    name: str
    size: int
    sha256: str


class VersionOut(Out):
    """One average at one step, immutable. `derived` is the kind of a derived version, else null.

    `decay` and `half_life_steps` are those of the rule at this step; null if the rule has none.
    """

    id: str
    run: str
    average: str
    spec: str
    step: int
    updates: int
    gap_steps: int
    created: str
    derived: str | None
    decay: float | None
    half_life_steps: float | None
    files: tuple[FileOut, ...]


class VersionsOut(Out):
    """Versions, newest first."""

    versions: tuple[VersionOut, ...]


class PublishedOut(Out):
    """The durable step of the run and its versions, one for each average."""

    step: int | None
    versions: tuple[VersionOut, ...]


class AverageOut(Out):
    """One average of a run, as in memory (without a trainer: as last written).

    `decay` and `half_life_steps` are those of the last step, `age_steps` is the mean age of the weights inside, and
    `initial_share` the share of the initial weights: of the first step, of the end of `update_after`, or of the last
    `set`; that of a `bema` can be negative. `warning` says what is wrong with the average; null if nothing is.
    """

    name: str
    spec: str
    updates: int
    gap_steps: int
    step: int | None
    accumulator: Literal["float32", "float64", "wire"]
    decay: float | None
    half_life_steps: float | None
    age_steps: float | None
    initial_share: float | None
    warning: str | None


class QuarantineOut(Out):
    """The last snapshot that was refused because it had values that are not finite."""

    step: int
    tensors: tuple[str, ...]
    text: str
    at: str


class NonFiniteBuffersOut(Out):
    """Buffers with NaN or Inf in consecutive snapshots: every average but `raw` keeps their last finite value.

    They are finite again if `last_step` is not the run's `step`. At most 100 names are listed.
    """

    tensors: tuple[str, ...]
    first_step: int
    last_step: int
    snapshots: int


class RingOut(Out):
    """Stored snapshots of the run's power averages; `error` says why no more are stored."""

    snapshots: int
    first_step: int | None
    last_step: int | None
    error: str | None


class DroppedStepsOut(Out):
    """Steps that were dropped because of a rank, for one reason. `rank` is null for ranks beyond those counted."""

    rank: int | None
    reason: DropReason
    steps: int


class LastDroppedOut(Out):
    """The last step that was dropped, because of which rank, and why."""

    step: int
    rank: int
    reason: DropReason
    text: str
    at: str


class RanksOut(Out):
    """The ranks of a sharded trainer, and the steps that were dropped since the server's start: gaps for the whole run.

    `present` is 0 without a trainer. `missing` are the ranks without which no step counts at present; at most 8 are
    listed. A step is dropped because a rank `skipped` it, `passed` it without its whole part, `left`, is `lost` or
    `silent`, was `late` to begin it, or has gone back (`rewound`). At most 64 ranks are counted alone.
    """

    world: int
    present: int
    missing: tuple[int, ...]
    dropped_steps: int
    dropped: tuple[DroppedStepsOut, ...]
    last_dropped: LastDroppedOut | None


class RunOut(Out):
    """State, steps, rates and gaps of a run. `derived` names the averages of its derived versions.

    `disk_bytes` is what its files take on the server's disk, each hard-linked file once; null until it is measured.
    `publish_every_seconds` and `publish_every_steps`: how often it is published while it changes, whichever comes
    first; null if the time or the steps do not count, or the run is not in memory. `ranks` is null unless several ranks
    have streamed it since the server's start. `lane` says how its trainer sends snapshots: `shm` through memory that it
    shares with the server (all ranks do), `zmq` through the server's socket; null without a trainer.
    """

    run: str
    state: Literal["active", "waiting", "lost", "finished"]
    created: str
    step: int | None
    published_step: int | None
    first_step: int | None
    every: int
    steps_per_second: float | None
    applied: int
    gap_steps: int
    quarantined: int
    quarantine: QuarantineOut | None
    nonfinite_buffers: NonFiniteBuffersOut | None
    exempt: tuple[str, ...]
    tensors: int
    snapshot_bytes: int
    memory_bytes: int
    publish_error: str | None
    averages: tuple[AverageOut, ...]
    derived: tuple[str, ...] = ()
    ring: RingOut | None = None
    disk_bytes: int | None = None
    publish_every_seconds: float | None = None
    publish_every_steps: int | None = None
    ranks: RanksOut | None = None
    lane: Literal["shm", "zmq"] | None = None


class RunsOut(Out):
    """All runs of the server."""

    runs: tuple[RunOut, ...]


class FindingIn(BaseModel):
    """The result of an evaluation: metrics, or the error that prevented them.

    `missing` has the metrics without a finite value, each with the reason (`nan`, `inf`, `-inf`, or a text).
    """

    model_config = ConfigDict(extra="forbid")

    metrics: dict[Name, Finite] = Field(default_factory=dict, max_length=1000)
    missing: dict[Name, Reason] = Field(default_factory=dict, max_length=1000)
    error: Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None = None
    samples: int | None = Field(default=None, ge=0, le=2**53)
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _metrics_or_error(self) -> FindingIn:
        if bool(self.metrics or self.missing) == (self.error is not None):
            raise ValueError("give either metrics (at least one, or its reason in missing) or error")
        both = self.metrics.keys() & self.missing.keys()
        if both:
            raise ValueError(f"{min(both)!r} is in metrics and in missing: give it once")
        return self


class ReportIn(FindingIn):
    """The result of a worker for a version and a task."""

    task: Name = "default"
    worker: Annotated[str, StringConstraints(max_length=200)] | None = None


class MetricsRowOut(Out):
    """One report: a version, a task, a worker, and the metrics or the error.

    `missing` has the metrics without a finite value, each with the reason (`nan`, `inf`, `-inf`, or a text).
    """

    version: str
    average: str
    step: int
    task: str
    worker: str | None
    metrics: dict[str, float]
    missing: dict[str, str]
    error: str | None
    samples: int | None
    seconds: float | None
    at: str


class MetricsOut(Out):
    """Reports of a run, ordered by step, average, task and worker."""

    metrics: tuple[MetricsRowOut, ...]


class HealthOut(Out):
    """The event loop answers."""

    status: Literal["ok"] = "ok"


class CheckOut(Out):
    """One condition for readiness, and what was found."""

    ok: bool
    detail: str


class ReadyOut(Out):
    """The server is ready, check by check."""

    ready: bool
    checks: dict[str, CheckOut]


class ProblemOut(Out):
    """An error, RFC 9457. `code` is the word to branch on; `detail` says what is wrong and what to do."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
