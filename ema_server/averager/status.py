"""Builds the status of an average, and of a run that is only on disk."""

from __future__ import annotations

from ema_proto.averages.rules import AverageSpec, Raw
from ema_proto.averages.specs import parse_average
from ema_proto.averages.step_units import StepUnits
from ema_proto.wire.manifest import Manifest
from ema_server.rules.initial_share import initial_share_warning
from ema_server.rules.ledger import Ledger
from ema_server.rules.weights import shown_reach
from ema_server.runs.average import Average
from ema_server.runs.status_store import AverageStatus, RunState, RunStatus
from ema_server.storage.catalog import Generation
from ema_server.storage.records import AverageRecord, GenerationRecord, newest_step_units


def status_on_disk(generation: Generation, record: GenerationRecord, manifest: Manifest) -> RunStatus:
    """The status of a run that is not in memory, from its newest generation.

    Raises:
        ValueError: a ledger or a rule in the record cannot be read.
    """
    run = record.run
    ledger, step_units = Ledger.from_json(run.ledger), newest_step_units(run.step_units_history)
    rules = [parse_average(average.spec, name=average.name) for average in run.averages]
    return RunStatus(
        run=generation.run,
        state=RunState.FINISHED if record.info.finished else RunState.WAITING,
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
            average_status(average, rule, Ledger.from_json(average.ledger), step_units, run.open_gap)
            for average, rule in zip(run.averages, rules, strict=True)
        ),
        is_current=False,
    )


def average_status(
    average: Average | AverageRecord, rule: AverageSpec, ledger: Ledger, step_units: StepUnits, open_gap: int
) -> AverageStatus:
    """The status of one average, in memory or as recorded. `open_gap` as in `Run`."""
    step = ledger.last_step
    decay, half_life_steps = (None, None) if step is None else shown_reach(rule, step, ledger.origin, step_units)
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
        warning=None if step is None else initial_share_warning(average.initial_share),
    )
