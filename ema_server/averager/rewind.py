"""Takes a run back to an older generation: the publisher makes that the newest one, and memory follows it."""

from __future__ import annotations

from dataclasses import replace

from ema_server.averager.active_run import ActiveRun, PendingRewind, Phase, PublishRequest
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import Failed, Outcome, Rewind, Rewound
from ema_server.publishing.publisher import CutRing, PublishResult
from ema_server.rules.ledger import Ledger
from ema_server.storage.generation import read_record
from ema_server.storage.records import AverageRecord, BrokenGeneration, RunRecord


def rewind(runs: ActiveRuns, active: ActiveRun, job: Rewind) -> None:
    """Go back to the newest generation at or before the job's step."""
    last_step = active.run.last_step
    if not active.is_idle:
        runs.hold(job)
    elif last_step is None:
        job.reply(Failed(f"run {job.run!r} has had no snapshot: there is nothing to rewind"))
    elif job.step >= last_step:
        active.publish(PublishRequest("rewind", lambda outcome: job.reply(_rewound(active, outcome))))
    else:
        begin_rewind(runs, active, PendingRewind(job.step, False, lambda failed: job.reply(_rewound(active, failed))))


def begin_rewind(runs: ActiveRuns, active: ActiveRun, pending: PendingRewind) -> None:
    """Rewind an idle run with a snapshot, and call `pending.done` at the end."""
    now = active.run.record(active.run.last_step or 0)
    for source in runs.kept(active.name):
        if source.step <= pending.step:
            try:
                record = carried_back(read_record(source.folder).run, now)
            except BrokenGeneration as error:
                runs.resources.publisher.set_bad(source, error)
            else:
                active.begin_rewind(source, record, pending)
                return
    pending.done(Failed(f"run {active.name!r} has no generation at or before step {pending.step}"))


def end_rewind(runs: ActiveRuns, active: ActiveRun, pending: PendingRewind, result: PublishResult) -> None:
    """Take the publisher's result: bring memory to the new generation, and call `pending.done`."""
    active.phase = Phase.IDLE
    if result.broken and not pending.is_loaded:
        begin_rewind(runs, active, pending)
        return
    failed = None if result.generation is not None else Failed(result.error)
    try:
        if result.generation is None:
            if pending.is_loaded:
                runs.drop(active)  # memory is at a step that the disk is not at
        elif pending.is_loaded:
            active.generation = result.generation
        else:
            runs.reload(active, result.generation)
    except (BrokenGeneration, OSError, MemoryError) as error:
        runs.drop(active)
        failed = Failed(f"the generation could not be loaded: {error}")
    if failed is None and active.generation is not None:
        runs.resources.publisher.submit(CutRing(active.name, active.generation.step))
        active.show()
    pending.done(failed)
    active.rewind = None


def carried_back(old: RunRecord, now: RunRecord) -> RunRecord:
    """The run as recorded in `old`, with the averages that it has `now`.

    Those that both have are as in `old`. Those added since have no content and begin with the next snapshot; those
    removed since stay removed. An average that was removed and added again in between is another one of that name.
    """
    known = {_identity(average): average for average in old.averages}
    kept = tuple(known[_identity(average)] for average in now.averages if _identity(average) in known)
    added = tuple(_without_content(average, old.step) for average in now.averages if _identity(average) not in known)
    return replace(old, averages=(*kept, *added), removed=now.removed)


def _identity(average: AverageRecord) -> tuple[str, str, object]:
    return average.name, average.spec, average.ledger["origin"]


def _without_content(average: AverageRecord, step: int) -> AverageRecord:
    return AverageRecord(average.name, average.spec, 0, 0, 0.0, 1.0, (), Ledger(step).to_json())


def _rewound(active: ActiveRun, outcome: Outcome | None) -> Rewound | Failed:
    """The answer to a rewind job. One to where the run is moves nothing, but is durable like any other."""
    return outcome if isinstance(outcome, Failed) else Rewound(active.run.last_step or 0, active.run.recent)
