"""The content of `generation.json` and `version.json`: values to JSON bytes, and back.

A version's id is the first 40 hex digits of the sha256 of the canonical JSON (sorted keys, no blanks) of its
`version.json` without `id`, `created` and that file's own entry: the same weights with the same history have one id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import UNKNOWN, StepUnits
from ema_proto.errors import LocalProtocolError
from ema_proto.wire.manifest import Manifest
from ema_server.rules.weights import points, shown_reach
from ema_server.storage.catalog import FileEntry

FORMAT = 1
GENERATION_FILE = "generation.json"
MANIFEST_FILE = "manifest.json"
VERSION_FILE = "version.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # the files of PEFT
ADAPTER_FILE = "adapter_model.safetensors"
DIFFUSERS_KEY = "_diffusers_version"  # diffusers' save_pretrained writes it into config.json
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
SECOND_NAMES = frozenset({ADAPTER_FILE, DIFFUSERS_FILE})


class BrokenGeneration(Exception):
    """A file of a generation or version is missing or has wrong content; the text says which and why."""


@dataclass(frozen=True, slots=True)
class AverageRecord:
    """One average as it stood; `ledger` as JSON values.

    `age_steps` is the mean age of the weights inside, `initial_share` the share of those it began from; `window` has
    step and count of the snapshots inside, oldest first.
    """

    name: str
    spec: str
    updates: int
    gap_steps: int
    age_steps: float
    initial_share: float
    window: tuple[tuple[int, int], ...]
    ledger: dict[str, Any]

    @property
    def has_content(self) -> bool:
        """Whether it has had a snapshot. Otherwise it has no files."""
        return self.updates > 0


@dataclass(frozen=True, slots=True)
class RemovedRecord:
    """An average that was removed. A trainer that was started with it may still list it."""

    name: str
    spec: str


@dataclass(frozen=True, slots=True)
class StepUnitsRecord:
    """Step units as the trainer gave them; they apply to snapshots of `from_step` and later."""

    from_step: int
    samples_per_step: float | None
    steps_per_epoch: float | None

    @property
    def step_units(self) -> StepUnits:
        return StepUnits(self.samples_per_step, self.steps_per_epoch)


def newest_step_units(history: Sequence[StepUnitsRecord]) -> StepUnits:
    return history[-1].step_units if history else UNKNOWN


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it stood at `step`: everything a restart needs besides the averages' own bytes.

    `created` is when the run was first joined, in RFC 3339; `ledger`, as JSON values, has every applied step;
    `step_units_history` (`paces` in the files) has the units that trainers gave, oldest first; `refused_step` is the
    highest step that was quarantined since the run came into memory, 0 without any.
    """

    run: str
    step: int
    created: str
    ledger: dict[str, Any]
    every: int
    manifest_digest: str
    exempt: tuple[str, ...]
    applied: int
    gap_steps: int
    quarantined: int
    averages: tuple[AverageRecord, ...]
    removed: tuple[RemovedRecord, ...]
    step_units_history: tuple[StepUnitsRecord, ...]
    refused_step: int = 0

    @property
    def open_gap(self) -> int:
        """Steps after `step` that were due and refused."""
        return points(self.every, self.step, self.refused_step) if self.applied else 0


@dataclass(frozen=True, slots=True)
class GenerationInfo:
    """What describes a generation besides its content.

    `seq` grows by one with each generation of a run, `created` is in RFC 3339. A `pinned` generation is kept beyond the
    newest ones; a `finished` one is the last of its run.
    """

    seq: int
    created: str
    reason: str
    pinned: bool
    finished: bool


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """The content of `generation.json`. `files` maps paths within the folder to size and sha256."""

    info: GenerationInfo
    run: RunRecord
    files: dict[str, FileEntry]


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 text, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def dump(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def manifest_bytes(manifest: Manifest) -> bytes:
    return json.dumps(manifest.to_json(), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def version_bytes(record: RunRecord, average: AverageRecord, created: str, files: tuple[FileEntry, ...]) -> bytes:
    """The content of `version.json` for one average of a run; `files` are the other files of the version.

    `decay` and `half_life_steps` are what the rule came to at the version's step: they follow from what else is there.
    """
    rule = parse_average(average.spec, name=average.name)
    decay, half_life_steps = shown_reach(
        rule, record.step, int(average.ledger["origin"]), newest_step_units(record.step_units_history)
    )
    content = {
        "run": record.run,
        "average": average.name,
        "spec": average.spec,
        "decay": decay,
        "half_life_steps": half_life_steps,
        "step": record.step,
        "updates": average.updates,
        "gap_steps": average.gap_steps,
        "ledger": average.ledger,
        "paces": [asdict(units) for units in record.step_units_history],
        "files": [asdict(entry) for entry in files],
    }
    return identified(content, created)


def identified(content: Mapping[str, Any], created: str) -> bytes:
    """The content of a `version.json`, with the id that follows from it."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return dump({"id": hashlib.sha256(canonical).hexdigest()[:40], "created": created, **content})


def generation_bytes(record: GenerationRecord) -> bytes:
    info, run = record.info, record.run
    return dump(
        {
            "format": FORMAT,
            "run": run.run,
            "seq": info.seq,
            "step": run.step,
            "created": info.created,
            "reason": info.reason,
            "pinned": info.pinned,
            "finished": info.finished,
            "run_created": run.created,
            "ledger": run.ledger,
            "every": run.every,
            "manifest_digest": run.manifest_digest,
            "exempt": list(run.exempt),
            "counters": {"applied": run.applied, "gap_steps": run.gap_steps, "quarantined": run.quarantined},
            "refused_step": run.refused_step,
            "averages": [asdict(average) for average in run.averages],
            "removed": [asdict(average) for average in run.removed],
            "paces": [asdict(units) for units in run.step_units_history],
            "files": {path: {"size": entry.size, "sha256": entry.sha256} for path, entry in record.files.items()},
        }
    )


def read_generation(data: bytes) -> GenerationRecord:
    """Read what `generation_bytes` wrote.

    Raises:
        BrokenGeneration: it is something else.
    """
    value = read_json(data)
    try:
        if value["format"] != FORMAT:
            raise BrokenGeneration(f"{GENERATION_FILE} has format {value['format']!r}, this server reads {FORMAT}")
        files = {path: FileEntry(path, int(f["size"]), str(f["sha256"])) for path, f in value["files"].items()}
        info = GenerationInfo(
            seq=int(value["seq"]),
            created=str(value["created"]),
            reason=str(value["reason"]),
            pinned=bool(value["pinned"]),
            finished=bool(value["finished"]),
        )
        return GenerationRecord(info, _run_record(value), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BrokenGeneration(f"{GENERATION_FILE} is not a generation: {error!r}") from None


def read_json(data: bytes) -> dict[str, Any]:
    """Decode one JSON object.

    Raises:
        BrokenGeneration: it is not one.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BrokenGeneration(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BrokenGeneration("not a JSON object")
    return value


def _run_record(value: Mapping[str, Any]) -> RunRecord:
    counters = value["counters"]
    return RunRecord(
        run=str(value["run"]),
        step=int(value["step"]),
        created=str(value["run_created"]),
        ledger=dict(value["ledger"]),
        every=int(value["every"]),
        manifest_digest=str(value["manifest_digest"]),
        exempt=tuple(map(str, value["exempt"])),
        applied=int(counters["applied"]),
        gap_steps=int(counters["gap_steps"]),
        quarantined=int(counters["quarantined"]),
        averages=tuple(_average_record(average) for average in value["averages"]),
        removed=tuple(RemovedRecord(str(gone["name"]), str(gone["spec"])) for gone in value["removed"]),
        step_units_history=tuple(_step_units_record(units) for units in value["paces"]),
        refused_step=int(value.get("refused_step", 0)),
    )


def _step_units_record(value: Mapping[str, Any]) -> StepUnitsRecord:
    record = StepUnitsRecord(int(value["from_step"]), value["samples_per_step"], value["steps_per_epoch"])
    try:
        _ = record.step_units
    except LocalProtocolError as error:
        raise ValueError(str(error)) from None
    return record


def _average_record(value: Mapping[str, Any]) -> AverageRecord:
    return AverageRecord(
        name=str(value["name"]),
        spec=str(value["spec"]),
        updates=int(value["updates"]),
        gap_steps=int(value["gap_steps"]),
        age_steps=float(value["age_steps"]),
        initial_share=float(value["initial_share"]),
        window=tuple((int(step), int(count)) for step, count in value["window"]),
        ledger=dict(value["ledger"]),
    )
