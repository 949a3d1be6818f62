"""Builds the statuses that the board shows: of a run in memory, and of one on disk alone. Values in, values out."""

from __future__ import annotations

from ema_proto.manifest import Manifest
from ema_server.board import AverageStatus, RunState, RunStatus
from ema_server.catalog import Generation
from ema_server.course import Course
from ema_server.ledger import Ledger
from ema_server.records import GenerationRecord
from ema_server.run import Run


def status_in_memory(course: Course, run: Run) -> RunStatus:
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
        gap_steps=run.gap_steps,
        quarantined=run.quarantined,
        quarantine=course.quarantine,
        exempt=tuple(sorted(run.exempt)),
        tensors=len(run.manifest.tensors),
        snapshot_bytes=run.manifest.nbytes,
        memory_bytes=run.memory_bytes,
        publish_error=course.publish_error,
        averages=tuple(
            AverageStatus(a.rule.name, a.rule.spec, a.updates, a.gap_steps, a.ledger.last_step) for a in run.averages
        ),
    )


def status_on_disk(generation: Generation, record: GenerationRecord, manifest: Manifest) -> RunStatus:
    """A run that only its newest generation tells of.

    Raises:
        ValueError: a ledger in the record cannot be read.
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
        gap_steps=run.gap_steps,
        quarantined=run.quarantined,
        quarantine=None,
        exempt=run.exempt,
        tensors=len(manifest.tensors),
        snapshot_bytes=manifest.nbytes,
        memory_bytes=0,
        publish_error=None,
        averages=tuple(AverageStatus(a.name, a.spec, a.updates, a.gap_steps, run.step) for a in run.averages),
    )
