"""Snapshots into averages, or into quarantine. The averager's thread alone calls it.

Comes in: APPLY jobs. Goes out: updated runs and answers. A snapshot that may not count changes nothing but the status.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ema_proto.wire.manifest import Role
from ema_server.averager.active_run import ActiveRun
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import Applied, Apply, Quarantined
from ema_server.averager.publish import Publications
from ema_server.compute.pool import WorkerPool
from ema_server.runs.run import Run
from ema_server.runs.status_store import Quarantine
from ema_server.storage.records import rfc3339
from ema_server.telemetry import Telemetry

_TENSORS_SHOWN = 5
_TENSORS_KEPT = 100  # in the status, which readers poll: a model has up to 100,000


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a snapshot may not count, and the first of the tensors in question."""

    text: str
    tensors: tuple[str, ...]


def objection(run: Run, job: Apply) -> Objection | None:
    """Why the job's snapshot may not be applied to `run`; None when it may."""
    last_step = run.last_step
    if job.mode == "set" and last_step is not None and job.step < last_step:
        return Objection(f"a set of step {job.step} is below the last applied step {last_step}: rewind first", ())
    unclean = sorted(set(job.not_finite) - run.exempt - exempt_at_first(run, job))
    if not unclean:
        return None
    shown = ", ".join(unclean[:_TENSORS_SHOWN]) + (", ..." if len(unclean) > _TENSORS_SHOWN else "")
    text = f"NaN or Inf at step {job.step} in {len(unclean)} tensors: {shown}"
    return Objection(text, tuple(unclean[:_TENSORS_KEPT]))


def exempt_at_first(run: Run, job: Apply) -> frozenset[str]:
    """Buffers that are not finite in the run's first snapshot (causal masks hold -Inf): copied from then on."""
    if run.last_step is not None:
        return frozenset()
    buffers = {tensor.name for tensor in run.manifest.tensors if tensor.role is Role.BUFFER}
    return frozenset(job.not_finite) & buffers


@dataclass(slots=True)
class SnapshotApplier:
    """Applies snapshots."""

    courses: ActiveRuns
    flights: Publications
    pool: WorkerPool
    telemetry: Telemetry

    def apply(self, course: ActiveRun, run: Run, job: Apply, now: float) -> None:
        """Apply the snapshot, or quarantine it, or acknowledge it again if it was applied before."""
        objected = objection(run, job)
        last_step = run.last_step
        if job.mode == "update" and last_step is not None and job.step <= last_step:
            self.flights.write_alone(course)
            job.reply(Applied(job.step, run.exempt))
        elif objected is not None:
            self.flights.write_alone(course)
            self._quarantine(course, run, job, objected)
        else:
            self._apply(course, run, job)
            course.rate.note(now, job.step)
            self.courses.show(course)
            job.reply(Applied(job.step, run.exempt))

    def _apply(self, course: ActiveRun, run: Run, job: Apply) -> None:
        started = time.perf_counter()
        run.exempt_also(exempt_at_first(run, job))
        sink = course.boarding.draft if course.boarding is not None else None
        run.apply(self.pool, job.step, job.mode, job.data, sink)
        self.flights.take_off(course)
        self.telemetry.updates.inc()
        self.telemetry.update_seconds.inc(time.perf_counter() - started)

    def _quarantine(self, course: ActiveRun, run: Run, job: Apply, objected: Objection) -> None:
        run.quarantined += 1
        self.telemetry.quarantined.inc()
        at = rfc3339(self.flights.publisher.wall())
        course.quarantine = Quarantine(job.step, objected.tensors, objected.text, at)
        self.courses.show(course)
        job.reply(Quarantined(job.step, objected.text))
