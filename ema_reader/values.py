"""The server's answers as frozen dataclasses, made from decoded JSON. Unknown keys are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ema_proto.errors import LocalProtocolError
from ema_proto.names import OWN_FILES, check_file_name

_UNSAFE = ("", ".", "..")


def _check_file_name(name: str) -> None:
    try:
        check_file_name(name)
    except LocalProtocolError as error:
        raise ValueError(f"the server sent the name {name[:100]!r}, which is not a plain name: {error}") from None


def values_of(kind: type[Any], value: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """The arguments of a dataclass: `others`, and for each other field the value of the key of its name."""
    return {each.name: value[each.name] for each in fields(kind) if each.name not in others} | others


@dataclass(frozen=True, slots=True)
class File:
    """One file of a version: name (`NAME` or `FOLDER/NAME`), size in bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


def files_of(version: Mapping[str, Any]) -> tuple[File, ...]:
    """The files of a version, as the server or `version.json` lists them.

    Raises:
        ValueError: a name is not plain: it could lead outside the folder of a download.
    """
    files = tuple(File(item["name"], item["size"], item["sha256"]) for item in version["files"])
    for file in files:
        if file.name not in OWN_FILES:
            _check_file_name(file.name)
    return files


@dataclass(frozen=True, slots=True)
class Version:
    """One average at one step, immutable. `id` has 40 hex digits; `derived` says how it was made from other versions.

    `decay` and `half_life_steps` are those of its rule at its step, None where the rule has none.
    """

    id: str
    run: str
    average: str
    spec: str
    step: int
    updates: int
    gap_steps: int
    created: str
    files: tuple[File, ...]
    derived: str | None = None
    decay: float | None = None
    half_life_steps: float | None = None

    def __str__(self) -> str:
        return f"{self.run}/{self.average} at step {self.step} ({self.id[:12]})"

    def file(self, name: str) -> File | None:
        """The file of that name, None when the version has none."""
        return next((item for item in self.files if item.name == name), None)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Version:
        """Parse a version.

        Raises:
            ValueError: a name is not plain: it could lead outside the folder of a download.
        """
        files = files_of(value)
        for name in (value["run"], value["average"]):
            if name in _UNSAFE or "/" in name or "\\" in name or "\0" in name:
                raise ValueError(f"the server sent the name {name[:100]!r}, which is not a plain name")
        return cls(**values_of(cls, value, files=files))


@dataclass(frozen=True, slots=True)
class Average:
    """One average of a run.

    `step`, `age_steps` and `initial_share` are None before its first snapshot. `accumulator` is the dtype of its sums
    (`wire`: it has none). `decay` is that of the last step and `half_life_steps` belongs to it, None where the rule has
    none. `age_steps` is the mean age of the weights inside, `initial_share` the share of the initial weights. `warning`
    says what is wrong with it, None if nothing is.
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

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Average:
        """Parse an average."""
        return cls(**values_of(cls, value))


@dataclass(frozen=True, slots=True)
class Ring:
    """Stored snapshots of a run's power averages, to synthesise others; `error` says why no more are stored."""

    snapshots: int
    first_step: int | None
    last_step: int | None
    error: str | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ring:
        """Parse a ring."""
        return cls(**values_of(cls, value))


@dataclass(frozen=True, slots=True)
class DroppedSteps:
    """Steps that were dropped because of a rank, for one reason; `rank` is None for ranks beyond those counted."""

    rank: int | None
    reason: str
    steps: int


@dataclass(frozen=True, slots=True)
class LastDropped:
    """The last step that was dropped, because of which rank, why, and when (RFC 3339)."""

    step: int
    rank: int
    reason: str
    text: str
    at: str


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a sharded trainer, and the steps dropped since the server's start: gaps for the whole run.

    `present` is 0 without a trainer. `missing` are ranks without which no step counts at present, at most 8. Reasons
    are `skipped`, `passed`, `left`, `lost`, `silent`, `late` and `rewound`.
    """

    world: int
    present: int
    missing: tuple[int, ...]
    dropped_steps: int
    dropped: tuple[DroppedSteps, ...]
    last_dropped: LastDropped | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ranks:
        """Parse the ranks of a run."""
        last = value["last_dropped"]
        made = values_of(
            cls,
            value,
            missing=tuple(value["missing"]),
            dropped=tuple(DroppedSteps(**values_of(DroppedSteps, each)) for each in value["dropped"]),
            last_dropped=None if last is None else LastDropped(**values_of(LastDropped, last)),
        )
        return cls(**made)


@dataclass(frozen=True, slots=True)
class Run:
    """One run; `state` is `active`, `waiting` (no trainer), `lost` (silent) or `finished`.

    `derived` names the averages that were made from other versions; `ring` is what power averages can be made from.
    `nonfinite_buffers` names buffers with NaN or Inf in the last snapshot: averages keep their last finite value.
    `disk_bytes` is what its files take on the server's disk, None before the server has measured it.
    `publish_every_seconds` and `publish_every_steps` are how often it is published while it changes, None if the time
    or the steps do not count, or no trainer streams it. `ranks` is None unless several ranks have streamed it since the
    server's start. `lane` says how its trainer sends snapshots: `shm` through memory that it shares with the server,
    `zmq` through the server's socket; None without a trainer.
    """

    run: str
    state: str
    step: int | None
    published_step: int | None
    steps_per_second: float | None
    applied: int
    gap_steps: int
    quarantined: int
    publish_error: str | None
    averages: tuple[Average, ...]
    derived: tuple[str, ...] = ()
    ring: Ring | None = None
    nonfinite_buffers: tuple[str, ...] = ()
    disk_bytes: int | None = None
    publish_every_seconds: float | None = None
    publish_every_steps: int | None = None
    ranks: Ranks | None = None
    lane: str | None = None

    @property
    def finished(self) -> bool:
        """Whether its trainer has finished it."""
        return self.state == "finished"

    @property
    def average_names(self) -> tuple[str, ...]:
        """Every average that may have versions: those of the trainer, then derived ones."""
        return (*(average.name for average in self.averages), *self.derived)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Run:
        """Parse a run."""
        nonfinite = value.get("nonfinite_buffers") or {"tensors": (), "last_step": None}
        lasts = nonfinite["last_step"] == value["step"]
        made = values_of(
            cls,
            value,
            averages=tuple(Average.from_json(item) for item in value["averages"]),
            derived=tuple(value["derived"]),
            ring=None if value["ring"] is None else Ring.from_json(value["ring"]),
            nonfinite_buffers=tuple(nonfinite["tensors"]) if lasts else (),
            disk_bytes=value.get("disk_bytes"),
            publish_every_seconds=value.get("publish_every_seconds"),
            publish_every_steps=value.get("publish_every_steps"),
            ranks=None if value.get("ranks") is None else Ranks.from_json(value["ranks"]),
            lane=value.get("lane"),
        )
        return cls(**made)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The steps inside a version with their shares, newest first; `rest` is the share of omitted older steps.

    `decay` and `half_life_steps` are those of `Version`.
    """

    run: str
    average: str
    version: str
    spec: str
    decay: float | None
    half_life_steps: float | None
    step: int
    origin: int
    steps: tuple[tuple[int, float], ...]
    rest: float

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """Parse a ledger."""
        steps = tuple((int(step), float(share)) for step, share in value["steps"])
        return cls(**values_of(cls, value, steps=steps))


@dataclass(frozen=True, slots=True)
class Validation:
    """A requested validation: `state` is `waiting`, `running`, `done` (has metrics) or `failed` (has `error`).

    `missing` has the metrics without a finite value, each with the reason (`nan`, `inf`, `-inf`, or a text).
    `note` says why no worker evaluates it; `samples` and `seconds` are those of the evaluation, if known.
    """

    id: str
    state: str
    run: str
    average: str
    version: str
    step: int
    task: str
    metrics: dict[str, float]
    missing: dict[str, str]
    error: str | None
    samples: int | None
    seconds: float | None
    worker: str | None
    note: str | None

    @property
    def ended(self) -> bool:
        """Whether it has metrics or an error."""
        return self.state in ("done", "failed")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Validation:
        """Parse a validation."""
        return cls(**values_of(cls, value))


@dataclass(frozen=True, slots=True)
class MetricsRow:
    """A report about a version for a task: `metrics`, or the `error` that prevented them.

    `missing` has the metrics without a finite value, each with the reason (`nan`, `inf`, `-inf`, or a text).
    """

    version: str
    average: str
    step: int
    task: str
    worker: str | None
    metrics: dict[str, float]
    error: str | None
    at: str
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MetricsRow:
        """Parse a row."""
        return cls(**values_of(cls, value, metrics=dict(value["metrics"])))
