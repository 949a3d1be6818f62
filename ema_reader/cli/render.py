"""Values as tables for people, and as JSON for programs. Column names are the keys of the JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ema_reader.cli.tables import table, terminal_width, wrapped
from ema_reader.evaluation.worker import Outcome
from ema_reader.scores import Score, metric_names
from ema_reader.values import Average, Ledger, Ranks, Run, Validation, Version

_NAMES_SHOWN = 3
_NON_FINITE = ("nan", "inf", "-inf")
_ID_CHARS = 12
_STATE_WORDS = {"waiting": "no-trainer"}  # in tables: the run itself waits for nothing
_ROUNDING = 1e-9  # by which ten million shares that add up to 1 may miss it


def status_text(runs: Sequence[Run], *, long: bool = False) -> str:
    """One line for each run, then what needs attention."""
    if not runs:
        return "no runs yet"
    columns = ("run", "state", "step", "published_step", "steps_per_second", "applied", "gap_steps", "disk_bytes")
    rows = [
        (
            *(r.run, _STATE_WORDS.get(r.state, r.state), r.step, r.published_step),
            *(r.steps_per_second, r.applied, r.gap_steps),
            _size_cell(r.disk_bytes, long=long),
            _names(r),
        )
        for r in runs
    ]
    optional = ("published_step", "steps_per_second", "averages", "gap_steps", "disk_bytes", "applied")
    notes = [f"{r.run}: cannot publish: {r.publish_error}" for r in runs if r.publish_error is not None]
    notes += [_missing_text(r.run, r.ranks) for r in runs if r.ranks is not None and r.ranks.missing]
    notes += [f"{r.run}: no more is stored to synthesise from: {r.ring.error}" for r in runs if r.ring and r.ring.error]
    notes += [f"{r.run}: {r.quarantined} snapshots were not finite and left out" for r in runs if r.quarantined]
    notes += [
        f"{r.run}: NaN or Inf in buffers, which averages keep at their last finite value: {_few(r.nonfinite_buffers)}"
        for r in runs
        if r.nonfinite_buffers
    ]
    notes += [f"{r.run}/{a.name}: {a.warning}" for r in runs for a in r.averages if a.warning is not None]
    return "\n".join([table((*columns, "averages"), rows, optional=optional, long=long), *wrapped(notes)])


def publishing_text(run: Run) -> str | None:
    """How often a run is published; None if nothing is left to publish."""
    if run.state != "active":
        return None
    seconds = [] if run.publish_every_seconds is None else [f"every {run.publish_every_seconds:g} s"]
    steps = [] if run.publish_every_steps is None else [f"every {run.publish_every_steps} steps"]
    return f"published {' and '.join([*seconds, *steps]) or 'on request only'}"


def lane_text(run: Run) -> str | None:
    """How the snapshots of a run reach the server; None without a trainer."""
    if run.lane is None:
        return None
    ways = {"shm": "shared memory", "zmq": "the server's socket"}
    return f"snapshots come through {ways.get(run.lane, run.lane)}"


def ranks_text(run: Run) -> str | None:
    """The ranks of a sharded trainer, and which steps were dropped because of whom; None for other trainers."""
    ranks = run.ranks
    if ranks is None:
        return None
    lines = [f"{ranks.present} of {ranks.world} ranks; {ranks.dropped_steps} steps dropped since the server's start"]
    for each in ranks.dropped:
        lines.append(f"  {'other ranks' if each.rank is None else f'rank {each.rank}'} {each.reason}: {each.steps}")
    if ranks.last_dropped is not None:
        lines.append(f"  the last one is step {ranks.last_dropped.step}: {ranks.last_dropped.text}")
    return "\n".join(lines)


def newest_metrics_text(run: Run, newest: Mapping[str, Score], *, long: bool = False) -> str:
    """One line for each average of a run, with its newest metrics."""
    names = metric_names(newest.values())
    rows = []
    for average in run.average_names:
        score = newest.get(average)
        rows.append((average, None if score is None else score.step, *metric_cells(score, names)))
    lines = table(("average", "metrics_step", *names), rows, optional=names, long=long)
    return "\n".join([lines, *wrapped(metric_notes(newest.values()))])


def versions_text(versions: Sequence[Version], scores: Mapping[str, Score], *, long: bool) -> str:
    """One line for each version, with its metrics; `long` shows every column."""
    if not versions:
        return "no versions yet"
    listed = [scores[v.id] for v in versions if v.id in scores]
    names = metric_names(listed)
    exact = ("decay", "half_life_steps") if long else ()
    columns = ("average", "step", "id", "updates", "gap_steps", "size", "created", *exact, *names)
    rows: list[tuple[object, ...]] = []
    for v in versions:
        nbytes = sum({item.sha256: item.size for item in v.files}.values())  # the same content is downloaded once
        details = (_precisely(v.decay), _precisely(v.half_life_steps)) if long else ()
        created = v.created if long else age_text(v.created)
        rows.append(
            (
                *(v.average, v.step, shown_id(v.id, long=long), v.updates, v.gap_steps),
                *(_size_cell(nbytes, long=long), created, *details),
                *metric_cells(scores.get(v.id), names),
            )
        )
    lines = table(columns, rows, optional=(*names, "created", "size", "gap_steps", "updates"), long=long)
    return "\n".join([lines, *wrapped(metric_notes(listed))])


def averages_text(averages: Sequence[Average], *, long: bool = False) -> str:
    """One line for each average."""
    columns = ("name", "step", "updates", "gap_steps", "decay", "half_life_steps", "age_steps", "initial_share")
    rows = [
        (
            a.name,
            a.step,
            a.updates,
            a.gap_steps,
            _precisely(a.decay),
            _precisely(a.half_life_steps),
            _precisely(a.age_steps),
            None if a.initial_share is None else f"{a.initial_share:.3%}",
            a.accumulator,
            a.spec,
        )
        for a in averages
    ]
    optional = ("spec", "decay", "age_steps", "half_life_steps", "initial_share", "updates", "gap_steps", "accumulator")
    notes = [f"{a.name}: {a.warning}" for a in averages if a.warning is not None]
    return "\n".join([table((*columns, "accumulator", "spec"), rows, optional=optional, long=long), *wrapped(notes)])


def ledger_text(ledger: Ledger, limit: int | None = None) -> str:
    """One line for each step inside a version, `limit` at most, then the share of the older ones."""
    listed, more = ledger.steps[:limit], ledger.steps[len(ledger.steps[:limit]) :]
    lines = table(("step", "share"), [(step, f"{share:.12g}") for step, share in listed])
    rest = ledger.rest + sum(share for _, share in more)
    if more:
        return (
            f"{lines}\n({len(more)} older steps, with {rest:.6g} of it, are not shown; --tail N or --json shows them)"
        )
    return f"{lines}\n{rest:.12g} of it lies in older steps" if rest > _ROUNDING else lines


def health_text(ready: bool, checks: Mapping[str, Mapping[str, object]]) -> str:
    """Ready or not, then each check."""
    rows = [("ok" if check.get("ok") else "FAILED", name, check.get("detail")) for name, check in checks.items()]
    lines = [f"{mark:6}  {name}: {detail}" for mark, name, detail in rows]
    return "\n".join(["ready" if ready else "not ready", *lines])


def outcome_text(outcome: Outcome) -> str:
    """One line for one evaluated version."""
    result = _pairs(outcome.metrics, outcome.missing) if outcome.error is None else f"FAILED: {outcome.error}"
    return f"{outcome.version}: {result} ({outcome.seconds:.1f} s)"


def validation_text(found: Validation) -> str:
    """One line for one validation that has ended."""
    result = _pairs(found.metrics, found.missing) if found.error is None else f"FAILED: {found.error}"
    samples = "" if found.samples is None else f"{found.samples} samples, "
    seconds = "" if found.seconds is None else f"{found.seconds:.1f} s, "
    by = f"({samples}{seconds}by {found.worker or 'a report'})"
    return f"{found.run}/{found.average} at step {found.step} ({shown_id(found.version)}): {result} {by}"


def metric_cells(score: Score | None, names: Sequence[str]) -> tuple[str | None, ...]:
    """The values of these metrics; None for a metric that a version does not have."""
    if score is None:
        return (None,) * len(names)
    shown = {name: f"{value:.6g}" for name, value in score.metrics.items()}
    shown |= {name: missing_text(reason) for name, reason in score.missing.items()}
    return tuple(shown.get(name) for name in names)


def metric_notes(scores: Iterable[Score]) -> list[str]:
    """A line for each failed evaluation, and for each missing metric whose cell does not say why."""
    found = tuple(scores)
    notes = [
        f"{score.average} at step {score.step}: task {task} failed: {error.splitlines()[0][:200]}"
        for score in found
        for task, error in score.errors.items()
    ]
    notes += [
        f"{score.average} at step {score.step}: {name} is missing: {reason}"
        for score in found
        for name, reason in score.missing.items()
        if reason not in _NON_FINITE
    ]
    return notes


def missing_text(reason: str) -> str:
    """Why a metric is missing, for a cell: `nan`, `inf`, `-inf`, or `missing` for a longer reason."""
    return reason if reason in _NON_FINITE else "missing"


def as_json(value: Any) -> str:
    """One line of JSON; dataclasses become objects."""
    return json.dumps(value, default=dataclasses.asdict)


def shown_id(version: str, *, long: bool = False) -> str:
    """The id of a version, or its first 12 digits."""
    return version if long else version[:_ID_CHARS]


def folder_text(path: Path) -> str:
    """Where a version was downloaded to: a sentence on a terminal, else only the folder."""
    return str(path) if terminal_width() is None else f"downloaded to {path}/"


def size_text(nbytes: int) -> str:
    """A size in decimal units."""
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


def age_text(created: str, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 time was; the time itself if it cannot be parsed."""
    try:
        seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(created)).total_seconds()
    except (ValueError, TypeError):
        return created
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} ago"
    return f"{max(0, int(seconds))} s ago"


def _size_cell(nbytes: int | None, *, long: bool) -> int | str | None:
    return nbytes if long or nbytes is None else size_text(nbytes)


def _precisely(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _pairs(metrics: Mapping[str, float], missing: Mapping[str, str]) -> str:
    shown = {name: f"{value:.6g}" for name, value in metrics.items()}
    shown |= {name: missing_text(reason) for name, reason in missing.items()}
    return "  ".join(f"{name}={text}" for name, text in shown.items())


def _missing_text(run: str, ranks: Ranks) -> str:
    named = ", ".join(map(str, ranks.missing))
    return (
        f"{run}: {ranks.world - ranks.present} of {ranks.world} ranks are missing, no step counts without them: {named}"
    )


def _names(run: Run) -> str:
    return ",".join(average.name for average in run.averages)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
