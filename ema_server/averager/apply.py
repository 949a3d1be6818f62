"""Applies snapshots to averages, or quarantines them. Only the averager's thread calls it.

A snapshot with NaN or Inf in a parameter is quarantined: it changes nothing but the status, and its step is a gap. A
buffer with NaN or Inf stays at its last finite value; the rest of the snapshot is applied.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from ema_proto.wire.manifest import Role
from ema_server.averager.active_run import ActiveRun
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import Applied, Apply, Quarantined
from ema_server.averager.publish import Publications
from ema_server.compute.pool import WorkerPool
from ema_server.runs.run import Run
from ema_server.runs.status_store import NonFiniteBuffers, Quarantine
from ema_server.storage.records import rfc3339
from ema_server.telemetry import Telemetry

_TENSORS_SHOWN = 5
_TENSORS_KEPT = 100  # in the status, which readers poll: a model has up to 100,000

logger = logging.getLogger("ema")


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
    unclean = sorted(set(job.not_finite) - run.exempt - nonfinite_buffers(run, job))
    if not unclean:
        return None
    text = f"NaN or Inf at step {job.step} in {len(unclean)} tensors: {_shown(unclean)}"
    return Objection(text, tuple(unclean[:_TENSORS_KEPT]))


def nonfinite_buffers(run: Run, job: Apply) -> frozenset[str]:
    """The buffers of the job's snapshot with NaN or Inf, without those that are exempt."""
    if not job.not_finite:
        return frozenset()
    buffers = {tensor.name for tensor in run.manifest.tensors if tensor.role is Role.BUFFER}
    return (frozenset(job.not_finite) & buffers) - run.exempt


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
        last_step = run.last_step
        sink = course.boarding.draft if course.boarding is not None else None
        kept = run.apply(self.pool, job.step, job.mode, job.data, sink, nonfinite_buffers(run, job))
        self.flights.take_off(course)
        self.telemetry.updates.inc()
        self.telemetry.update_seconds.inc(time.perf_counter() - started)
        if course.refused:
            logger.warning(
                "run %s: step %d is applied; %d snapshots before it were refused", run.name, job.step, course.refused
            )
            course.refused = 0
        course.nonfinite_buffers = _noted(course, job.step, last_step, sorted(kept))

    def _quarantine(self, course: ActiveRun, run: Run, job: Apply, objected: Objection) -> None:
        run.refuse(job.step, job.mode)
        self.telemetry.quarantined.inc()
        at = rfc3339(self.flights.publisher.wall())
        course.quarantine = Quarantine(job.step, objected.tensors, objected.text, at)
        if not course.refused:
            logger.warning(
                "run %s: %s; snapshots are refused until one is finite, and their steps are gaps",
                run.name,
                objected.text,
            )
        course.refused += 1
        self.courses.show(course)
        job.reply(Quarantined(job.step, objected.text))


def _noted(course: ActiveRun, step: int, last_step: int | None, kept: list[str]) -> NonFiniteBuffers | None:
    """What the status says of buffers that are not finite, after `step` was applied. Logs where it begins and ends."""
    before = course.nonfinite_buffers
    goes_on = before is not None and before.last_step == last_step
    if before is not None and goes_on and kept:
        return NonFiniteBuffers(tuple(kept[:_TENSORS_KEPT]), before.first_step, step, before.snapshots + 1)
    if kept:
        logger.warning(
            "run %s: NaN or Inf at step %d in %d buffers, which stay at their last finite value: %s",
            course.name,
            step,
            len(kept),
            _shown(kept),
        )
        return NonFiniteBuffers(tuple(kept[:_TENSORS_KEPT]), step, step, 1)
    if before is not None and goes_on:
        logger.warning(
            "run %s: all buffers are finite again at step %d, after %d snapshots", course.name, step, before.snapshots
        )
    return before


def _shown(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_TENSORS_SHOWN]) + (", ..." if len(names) > _TENSORS_SHOWN else "")
