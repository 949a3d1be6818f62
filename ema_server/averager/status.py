"""Builds the status of a run in memory, and of one that is only on disk. Pure functions."""

from __future__ import annotations

from ema_proto.averages.rules import AverageSpec, Raw
from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import StepUnits
from ema_proto.wire.manifest import Manifest
from ema_server.averager.active_run import ActiveRun
from ema_server.rules.half_life import shown_reach
from ema_server.rules.ledger import Ledger
from ema_server.runs.average import Average
from ema_server.runs.run import Run
from ema_server.runs.status_store import AverageStatus, RunState, RunStatus
from ema_server.storage.catalog import Generation
from ema_server.storage.records import AverageRecord, GenerationRecord, newest_step_units


def status_in_memory(course: ActiveRun, run: Run) -> RunStatus:
    """A run as it stands in memory."""
    return RunStatus(
        run=run.name,
        state=course.state,
        created=run.created,
        step=run.last_step,
        published_step=course.published_step,
        first_step=run.first_step,
        every=run.every,
        steps_per_second=course.rate.steps_per_second() if course.state is RunState.ACTIVE else None,
        applied=run.applied,
        gap_steps=run.gap_steps + run.open_gap,
        quarantined=run.quarantined,
        quarantine=course.quarantine,
        nonfinite_buffers=course.nonfinite_buffers,
        exempt=tuple(sorted(run.exempt)),
        tensors=len(run.manifest.tensors),
        snapshot_bytes=run.manifest.nbytes,
        memory_bytes=run.memory_bytes,
        publish_error=course.publish_error,
        averages=tuple(_average_status(a, a.rule, a.ledger, run.step_units, run.open_gap) for a in run.averages),
    )


def status_on_disk(generation: Generation, record: GenerationRecord, manifest: Manifest) -> RunStatus:
    """A run that only its newest generation tells of.

    Raises:
        ValueError: a ledger or a rule in the record cannot be read.
    """
    run = record.run
    ledger = Ledger.from_json(run.ledger)
    return RunStatus(
        run=generation.run,
        state=RunState.FINISHED if record.finished else RunState.WAITING,
        created=run.created,
        step=run.step,
        published_step=run.step,
        first_step=ledger.first_step,
        every=run.every,
        steps_per_second=None,
        applied=run.applied,
        gap_steps=run.gap_steps + run.open_gap,
        quarantined=run.quarantined,
        quarantine=None,
        nonfinite_buffers=None,
        exempt=run.exempt,
        tensors=len(manifest.tensors),
        snapshot_bytes=manifest.nbytes,
        memory_bytes=0,
        publish_error=None,
        averages=tuple(
            _average_status(
                kept,
                parse_average(kept.spec, name=kept.name),
                Ledger.from_json(kept.ledger),
                newest_step_units(run.step_units_history),
                run.open_gap,
            )
            for kept in run.averages
        ),
        is_current=False,
    )


def _average_status(
    average: Average | AverageRecord, rule: AverageSpec, ledger: Ledger, units: StepUnits, open_gap: int
) -> AverageStatus:
    step = ledger.last_step
    decay, half_life_steps = (None, None) if step is None else shown_reach(rule, step, ledger.origin, units)
    return AverageStatus(
        name=rule.name,
        spec=rule.spec,
        updates=average.updates,
        gap_steps=average.gap_steps + (0 if step is None else open_gap),
        step=step,
        accumulator="wire" if isinstance(rule, Raw) else rule.accumulator,
        decay=decay,
        half_life_steps=half_life_steps,
        age_steps=None if step is None else average.age_steps,
        initial_share=None if step is None else average.initial_share,
    )
