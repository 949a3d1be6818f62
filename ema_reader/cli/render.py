"""Values as tables for people, and as JSON for programs. Column names are the keys of the JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import typer

from ema_reader.evaluation.worker import Outcome
from ema_reader.scores import Score
from ema_reader.values import Average, Ledger, Run, Validation, Version

_NAMES_SHOWN = 3
_NON_FINITE = ("nan", "inf", "-inf")
_ID_CHARS = 12
_RULE_CHARS = 60  # patterns may have thousands
_LAST_CHARS_MIN = 8
_ROUNDING = 1e-9  # by which ten million shares that add up to 1 may miss it


def status_text(runs: Sequence[Run]) -> str:
    """One line for each run, then what needs attention."""
    if not runs:
        return "no runs yet"
    columns = ("run", "state", "step", "published_step", "steps_per_second", "applied", "gap_steps")
    rows = [
        (
            *(r.run, r.state, r.step, r.published_step, r.steps_per_second, r.applied, r.gap_steps),
            None if r.disk_bytes is None else size_text(r.disk_bytes),
            _names(r),
        )
        for r in runs
    ]
    notes = [f"{r.run}: cannot publish: {r.publish_error}" for r in runs if r.publish_error is not None]
    notes += [f"{r.run}: no more is stored to synthesise from: {r.ring.error}" for r in runs if r.ring and r.ring.error]
    notes += [f"{r.run}: {r.quarantined} snapshots were not finite and left out" for r in runs if r.quarantined]
    notes += [
        f"{r.run}: NaN or Inf in buffers, which averages keep at their last finite value: {_few(r.nonfinite_buffers)}"
        for r in runs
        if r.nonfinite_buffers
    ]
    notes += [f"{r.run}/{a.name}: {a.warning}" for r in runs for a in r.averages if a.warning is not None]
    return "\n".join([table((*columns, "disk_bytes", "averages"), rows), *notes])


def newest_metrics_text(run: Run, newest: Mapping[str, Score]) -> str:
    """One line for each average of a run, with its newest metrics."""
    rows = []
    for name in run.average_names:
        score = newest.get(name)
        rows.append((name, None if score is None else score.step, None if score is None else metrics_text(score)))
    return table(("average", "metrics_step", "metrics"), rows)


def versions_text(versions: Sequence[Version], scores: Mapping[str, Score], *, long: bool) -> str:
    """One line for each version, with its metrics; `long` shows every column."""
    if not versions:
        return "no versions yet"
    columns = ["average", "step", "id", "updates", "gap_steps", "size", "created", "metrics"]
    rows: list[tuple[object, ...]] = []
    for v in versions:
        metrics = metrics_text(scores[v.id]) if v.id in scores else None
        nbytes = sum(item.size for item in v.files)
        common = (v.average, v.step, shown_id(v.id, long=long), v.updates, v.gap_steps)
        if long:
            rows.append((*common, nbytes, v.created, _precisely(v.decay), _precisely(v.half_life_steps), metrics))
        else:
            rows.append((*common, size_text(nbytes), age_text(v.created), metrics))
    if long:
        columns[-1:-1] = ["decay", "half_life_steps"]
    return table(columns, rows)


def averages_text(averages: Sequence[Average]) -> str:
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
            _shortened(a.spec),
        )
        for a in averages
    ]
    notes = [f"{a.name}: {a.warning}" for a in averages if a.warning is not None]
    return "\n".join([table((*columns, "accumulator", "spec"), rows), *notes])


def ledger_text(ledger: Ledger) -> str:
    """One line for each step inside a version, then the share of the older ones."""
    lines = table(("step", "share"), [(step, f"{share:.12g}") for step, share in ledger.steps])
    return f"{lines}\n{ledger.rest:.12g} of it lies in older steps" if ledger.rest > _ROUNDING else lines


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


def metrics_text(score: Score) -> str:
    """The metrics of a version in one cell."""
    failed = "failed: " * bool(score.errors) + ", ".join(score.errors)
    return "  ".join(filter(None, (_pairs(score.metrics, score.missing), failed)))


def missing_text(reason: str) -> str:
    """Why a metric is missing, for a cell: `nan`, `inf`, `-inf`, or `missing` for a longer reason."""
    return reason if reason in _NON_FINITE else "missing"


def is_explained(reason: str) -> bool:
    """Whether `missing_text` says all of a reason."""
    return reason in _NON_FINITE


def as_json(value: Any) -> str:
    """One line of JSON; dataclasses become objects."""
    return json.dumps(value, default=dataclasses.asdict)


def shown_id(version: str, *, long: bool = False) -> str:
    """The id of a version, or its first 12 digits."""
    return version if long else version[:_ID_CHARS]


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


def styled(text: str, **style: Any) -> str:
    """Text in a style, which `typer.echo` removes where stdout is no terminal. `NO_COLOR` switches styles off."""
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, numbers to the right; None is shown as a dash.

    On a terminal too narrow for it, column names are broken at underscores, and the last column is cut.
    """
    texts = [[_cell(value) for value in row] for row in rows]
    numeric = [all(isinstance(row[column], int | float | None) for row in rows) for column in range(len(columns))]
    heads = [[name] for name in columns]
    room = _terminal_columns()
    if room is not None and _width(heads, texts) > room:
        heads = [_broken(name) for name in columns]
        left = room - _width(heads[:-1], [row[:-1] for row in texts]) - 2
        last = max(left, _LAST_CHARS_MIN, *(len(part) for part in heads[-1]))
        texts = [[*row[:-1], row[-1] if len(row[-1]) <= last else f"{row[-1][: last - 3]}..."] for row in texts]
    height = max(len(head) for head in heads)
    lines = [[head[at] if at < len(head) else "" for head in heads] for at in range(height)]
    widths = _widths(heads, texts)
    titles = [styled(_line(line, widths, numeric), bold=True) for line in lines]
    return "\n".join(titles + [_line(row, widths, numeric) for row in texts])


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    aligned = zip(cells, widths, numeric, strict=True)
    return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in aligned).rstrip()


def _widths(heads: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(text) for text in [*head, *(row[column] for row in texts)]) for column, head in enumerate(heads)]


def _width(heads: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> int:
    widths = _widths(heads, texts)
    return sum(widths) + 2 * (len(widths) - 1)


def _broken(name: str) -> list[str]:
    parts = name.split("_")
    return [f"{part}_" for part in parts[:-1]] + parts[-1:]


def _terminal_columns() -> int | None:
    """The width of the terminal; None where stdout is none, and nothing limits a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _precisely(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _pairs(metrics: Mapping[str, float], missing: Mapping[str, str]) -> str:
    shown = {name: f"{value:.6g}" for name, value in metrics.items()}
    shown |= {name: missing_text(reason) for name, reason in missing.items()}
    return "  ".join(f"{name}={text}" for name, text in shown.items())


def _shortened(spec: str) -> str:
    return spec if len(spec) <= _RULE_CHARS else f"{spec[: _RULE_CHARS - 3]}..."


def _names(run: Run) -> str:
    return ",".join(average.name for average in run.averages)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
