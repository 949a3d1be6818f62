"""Applies a snapshot to the averages of its run, or quarantines it.

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
from ema_server.averager.jobs import Applied, Apply, Quarantined
from ema_server.runs.run import Run
from ema_server.runs.status_store import NonFiniteBuffers, Quarantine

_TENSORS_SHOWN = 5
_TENSORS_KEPT = 100  # in the status, which readers poll: a model has up to 100,000

logger = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a snapshot may not be applied, and the first of the tensors in question."""

    text: str
    tensors: tuple[str, ...] = ()


def apply(active: ActiveRun, job: Apply) -> None:
    """Apply the snapshot, or quarantine it, or acknowledge it again if it was applied before."""
    run, objected = active.run, objection(active.run, job)
    if job.mode == "update" and run.last_step is not None and job.step <= run.last_step:
        active.write_draft()
        job.reply(Applied(job.step, run.exempt))
    elif objected is not None:
        active.write_draft()
        _quarantine(active, job, objected)
    else:
        _apply(active, job)
        job.reply(Applied(job.step, run.exempt))


def objection(run: Run, job: Apply) -> Objection | None:
    """Why the job's snapshot may not be applied to `run`; None if it may."""
    last_step, origin = run.last_step, run.ledger.origin
    if job.mode == "set" and last_step is not None and job.step < last_step:
        return Objection(f"a set of step {job.step} is below the last applied step {last_step}: rewind first")
    if job.step < origin or (job.step == origin and job.mode == "update"):
        return Objection(f"step {job.step} is not above step {origin}, which the trainer had taken when the run began")
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


def _apply(active: ActiveRun, job: Apply) -> None:
    run, resources, started = active.run, active.resources, time.perf_counter()
    last_step = run.last_step
    kept = run.apply(resources.pool, job.step, job.mode, job.data, active.draft, nonfinite_buffers(run, job))
    active.commit_draft()
    resources.telemetry.updates.inc()
    resources.telemetry.update_seconds.inc(time.perf_counter() - started)
    if active.refused:
        text = "run %s: step %d is applied; %d snapshots before it were refused"
        logger.warning(text, run.name, job.step, active.refused)
        active.refused = 0
    active.nonfinite_buffers = _track_nonfinite(active, job.step, last_step, sorted(kept))
    active.rate.add(resources.clock(), job.step)
    active.show()


def _quarantine(active: ActiveRun, job: Apply, objected: Objection) -> None:
    active.run.refuse(job.step, job.mode)
    active.resources.telemetry.quarantined.inc()
    active.quarantine = Quarantine(job.step, objected.tensors, objected.text, active.resources.now())
    if not active.refused:
        text = "run %s: %s; snapshots are refused until one can be applied, and their steps are gaps"
        logger.warning(text, active.name, objected.text)
    active.refused += 1
    active.show()
    job.reply(Quarantined(job.step, objected.text))


def _track_nonfinite(active: ActiveRun, step: int, last_step: int | None, kept: list[str]) -> NonFiniteBuffers | None:
    """What the status says of buffers that are not finite after `step`. Logs only where a spell begins and ends."""
    before = active.nonfinite_buffers
    goes_on = before is not None and before.last_step == last_step
    if before is not None and goes_on and kept:
        return NonFiniteBuffers(tuple(kept[:_TENSORS_KEPT]), before.first_step, step, before.snapshots + 1)
    if kept:
        text = "run %s: NaN or Inf at step %d in %d buffers, which stay at their last finite value: %s"
        logger.warning(text, active.name, step, len(kept), _shown(kept))
        return NonFiniteBuffers(tuple(kept[:_TENSORS_KEPT]), step, step, 1)
    if before is not None and goes_on:
        text = "run %s: all buffers are finite again at step %d, after %d snapshots"
        logger.warning(text, active.name, step, before.snapshots)
    return before


def _shown(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_TENSORS_SHOWN]) + (", ..." if len(names) > _TENSORS_SHOWN else "")
