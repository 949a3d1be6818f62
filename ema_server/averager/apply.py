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
    run = active.run
    if job.mode == "update" and run.last_step is not None and job.step <= run.last_step:
        active.write_draft()
        job.reply(Applied(job.step, run.exempt))
        return
    objected, not_finite = _wrong_step(run, job), frozenset[str]()
    if objected is None:
        if job.not_finite is None and _applied_if_finite(active, job):
            job.reply(Applied(job.step, run.exempt))
            return
        found = run.not_finite(active.resources.pool, job.data) if job.not_finite is None else job.not_finite
        not_finite = frozenset(found) - run.exempt
        objected = _unclean(run, job.step, not_finite)
    if objected is not None:
        active.write_draft()
        _quarantine(active, job, objected)
    else:
        _apply(active, job, not_finite)
        job.reply(Applied(job.step, run.exempt))


def _wrong_step(run: Run, job: Apply) -> Objection | None:
    last_step, origin = run.last_step, run.ledger.origin
    if job.mode == "set" and last_step is not None and job.step < last_step:
        return Objection(f"a set of step {job.step} is below the last applied step {last_step}: rewind first")
    if job.step < origin or (job.step == origin and job.mode == "update"):
        return Objection(f"step {job.step} is not above step {origin}, which the trainer had taken when the run began")
    return None


def _unclean(run: Run, step: int, not_finite: frozenset[str]) -> Objection | None:
    """The objection to a snapshot with NaN or Inf in these tensors, if one of them is not a buffer."""
    if not not_finite:
        return None
    buffers = {tensor.name for tensor in run.manifest.tensors if tensor.role is Role.BUFFER}
    unclean = sorted(not_finite - buffers)
    if not unclean:
        return None
    text = f"NaN or Inf at step {step} in {len(unclean)} tensors: {_shown(unclean)}"
    return Objection(text, tuple(unclean[:_TENSORS_KEPT]))


def _applied_if_finite(active: ActiveRun, job: Apply) -> bool:
    """Check and apply a snapshot in one pass; False if it has to be checked before, and nothing has changed."""
    run, resources, started = active.run, active.resources, time.perf_counter()
    last_step = run.last_step
    if not run.apply_if_finite(resources.pool, resources.device, job.step, job.mode, job.data, active.draft):
        return False
    _note_applied(active, job.step, last_step, frozenset(), started)
    return True


def _apply(active: ActiveRun, job: Apply, nonfinite_buffers: frozenset[str]) -> None:
    run, started = active.run, time.perf_counter()
    last_step = run.last_step
    kept = run.apply(active.resources.pool, job.step, job.mode, job.data, active.draft, nonfinite_buffers)
    _note_applied(active, job.step, last_step, kept, started)


def _note_applied(active: ActiveRun, step: int, last_step: int | None, kept: frozenset[str], started: float) -> None:
    resources = active.resources
    active.commit_draft()
    resources.telemetry.updates.inc()
    resources.telemetry.update_seconds.inc(time.perf_counter() - started)
    if active.refused:
        text = "run %s: step %d is applied; %d snapshots before it were refused"
        logger.warning(text, active.name, step, active.refused)
        active.refused = 0
    active.nonfinite_buffers = _track_nonfinite(active, step, last_step, sorted(kept))
    active.rate.add(resources.clock(), step)
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
