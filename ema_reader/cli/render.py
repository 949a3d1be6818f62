"""Values as lines of text for people, and as JSON for programs. Pure: comes in: values; goes out: strings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ema_reader.evaluation.worker import Outcome
from ema_reader.values import Average, Ledger, Run, Validation, Version

_NAMES_SHOWN = 3
_RULE_CHARS = 60  # patterns may go on for thousands
_ROUNDING = 1e-9  # what ten million shares that add up to 1 may miss it by


def status_text(runs: Sequence[Run]) -> str:
    """One line for each run, then what needs attention."""
    if not runs:
        return "no runs yet"
    headings = ("RUN", "STATE", "STEP", "PUBLISHED", "STEPS/S", "UPDATES", "GAPS", "AVERAGES")
    rows = [
        (r.run, r.state, r.step, r.published_step, r.steps_per_second, r.applied, r.gap_steps, _names(r)) for r in runs
    ]
    notes = [f"{r.run}: cannot publish: {r.publish_error}" for r in runs if r.publish_error is not None]
    notes += [f"{r.run}: no more is stored to synthesise from: {r.ring.error}" for r in runs if r.ring and r.ring.error]
    notes += [f"{r.run}: {r.quarantined} snapshots were not finite and left out" for r in runs if r.quarantined]
    notes += [
        f"{r.run}: NaN or Inf in buffers, which averages keep at their last finite value: {_few(r.nonfinite_buffers)}"
        for r in runs
        if r.nonfinite_buffers
    ]
    return "\n".join([table(headings, rows), *notes])


def versions_text(versions: Sequence[Version]) -> str:
    """One line for each version."""
    if not versions:
        return "no versions yet"
    headings = ("AVERAGE", "STEP", "VERSION", "DECAY", "HALF-LIFE", "UPDATES", "GAPS", "BYTES", "CREATED")
    rows = [
        (
            v.average,
            v.step,
            v.id,
            _precisely(v.decay),
            _precisely(v.half_life_steps),
            v.updates,
            v.gap_steps,
            sum(item.size for item in v.files),
            v.created,
        )
        for v in versions
    ]
    return table(headings, rows)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))


def averages_text(averages: Sequence[Average]) -> str:
    """One line for each average."""
    headings = (
        "AVERAGE",
        "RULE",
        "DECAY",
        "HALF-LIFE",
        "MEAN AGE",
        "INITIAL",
        "UPDATES",
        "GAPS",
        "STEP",
        "ACCUMULATOR",
    )
    rows = [
        (
            a.name,
            _shortened(a.spec),
            _precisely(a.decay),
            _precisely(a.half_life_steps),
            _precisely(a.age_steps),
            None if a.initial_share is None else f"{a.initial_share:.3%}",
            a.updates,
            a.gap_steps,
            a.step,
            a.accumulator,
        )
        for a in averages
    ]
    return table(headings, rows)


def ledger_text(ledger: Ledger) -> str:
    """One line for each step inside a version, then what was left out."""
    lines = table(("STEP", "SHARE"), [(step, f"{share:.12g}") for step, share in ledger.steps])
    return f"{lines}\n{ledger.rest:.12g} of it lies in older steps" if ledger.rest > _ROUNDING else lines


def health_text(ready: bool, checks: Mapping[str, Mapping[str, object]]) -> str:
    """Ready or not, then each check."""
    rows = [("ok" if check.get("ok") else "FAILED", name, check.get("detail")) for name, check in checks.items()]
    lines = [f"{mark:6}  {name}: {detail}" for mark, name, detail in rows]
    return "\n".join(["ready" if ready else "not ready", *lines])


def outcome_text(outcome: Outcome) -> str:
    """One line for one evaluated version."""
    found = "  ".join(f"{name}={value:.6g}" for name, value in outcome.metrics.items())
    return (
        f"{outcome.version}: {found if outcome.error is None else 'FAILED: ' + outcome.error} ({outcome.seconds:.1f} s)"
    )


def validation_text(found: Validation) -> str:
    """One line for one validation that has ended."""
    metrics = "  ".join(f"{name}={value:.6g}" for name, value in found.metrics.items())
    said = metrics if found.error is None else f"FAILED: {found.error}"
    samples = "" if found.samples is None else f"{found.samples} samples, "
    seconds = "" if found.seconds is None else f"{found.seconds:.1f} s, "
    by = f"({samples}{seconds}by {found.worker or 'a report'})"
    return f"{found.run}/{found.average} at step {found.step} ({found.version[:12]}): {said} {by}"


def as_json(value: Any) -> str:
    """One line of JSON; dataclasses become objects."""
    return json.dumps(value, default=dataclasses.asdict)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, numbers to the right; None is shown as a dash."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [headings, *texts]) for column in range(len(headings))]
    numeric = [all(isinstance(row[column], int | float | None) for row in rows) for column in range(len(headings))]
    lines = []
    for line in [headings, *texts]:
        cells = zip(line, widths, numeric, strict=True)
        lines.append(
            "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in cells).rstrip()
        )
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _precisely(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _shortened(spec: str) -> str:
    return spec if len(spec) <= _RULE_CHARS else f"{spec[: _RULE_CHARS - 3]}..."


def _names(run: Run) -> str:
    return ",".join(average.name for average in run.averages)
