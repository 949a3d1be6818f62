"""Adds averages to a run that streams, and removes them. A change that cannot be made durable is undone."""

from __future__ import annotations

from ema_proto.averages.rules import AverageSpec, check_matches
from ema_proto.averages.step_units import check_step_units
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import AVERAGES_MAX
from ema_server.averager.active_run import ActiveRun, PublishRequest
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import AddAverage, Changed, Durable, Outcome, RemoveAverage, Unchanged, WhyNot
from ema_server.rules.ledger import Ledger
from ema_server.runs.average import Average, needed_nbytes, new_average
from ema_server.runs.run import Run


def add_average(runs: ActiveRuns, active: ActiveRun, job: AddAverage) -> None:
    """Add an average that begins with the next snapshot."""
    run, rule, resources = active.run, job.rule, active.resources
    conflict = _conflict(run, rule, resources.catalog.derived_averages(run.name))
    if conflict is not None:
        job.reply(Unchanged(WhyNot.CONFLICT, conflict))
        return
    try:
        try:
            added = new_average(run.manifest, rule, Ledger(run.last_step or 0), resources.device)
        except MemoryError:
            if not runs.drop_spares():
                raise
            added = new_average(run.manifest, rule, Ledger(run.last_step or 0), resources.device)
    except MemoryError as error:
        needed = needed_nbytes(run.manifest, rule)
        text = f"average {rule.name!r} of run {run.name!r} needs {needed} bytes of memory: {error}"
        job.reply(Unchanged(WhyNot.OUT_OF_MEMORY, text))
        return
    run.add(added)

    def on_published(outcome: Outcome) -> None:
        if isinstance(outcome, Durable):
            job.reply(Changed(rule.name))
        else:
            _drop(active, added)
            job.reply(Unchanged(WhyNot.NOT_DURABLE, f"average {rule.name!r} was not added: {outcome.text}"))

    active.show()
    active.publish(PublishRequest("change", on_published))


def remove_average(active: ActiveRun, job: RemoveAverage) -> None:
    """Remove an average, and free its memory once that is durable."""
    run = active.run
    found = next((average for average in run.present if average.rule.name == job.average), None)
    if found is None:
        names = ", ".join(average.rule.name for average in run.present)
        text = f"run {run.name!r} has no average {job.average!r}: it has {names}"
        job.reply(Unchanged(WhyNot.NO_SUCH_AVERAGE, text))
        return
    if not any(average.has_content for average in run.present if average is not found):
        text = (
            f"average {job.average!r} is the only one of run {run.name!r} that has weights: "
            "add another, and remove this one after the next snapshot"
        )
        job.reply(Unchanged(WhyNot.CONFLICT, text))
        return
    run.mark_removed(found)

    def on_published(outcome: Outcome) -> None:
        if isinstance(outcome, Durable):
            _drop(active, found)
            job.reply(Changed(job.average))
        else:
            run.unmark_removed(found)
            active.show()
            job.reply(Unchanged(WhyNot.NOT_DURABLE, f"average {job.average!r} was not removed: {outcome.text}"))

    active.show()
    active.publish(PublishRequest("change", on_published))


def _drop(active: ActiveRun, average: Average) -> None:
    active.run.remove(average)
    active.resources.device.trim()
    active.show()


def _conflict(run: Run, rule: AverageSpec, derived: tuple[str, ...]) -> str | None:
    """Why the run cannot have this average; None if it can. `derived` are the names of its derived averages."""
    if run.last_step is None:
        return f"run {run.name!r} has had no snapshot yet: add {rule.name!r} after its first one"
    if any(average.rule.name.lower() == rule.name.lower() for average in run.averages):
        return f"run {run.name!r} has an average {rule.name!r}: remove it first, or give the new one another name"
    if rule.name.lower() in map(str.lower, derived):
        return f"run {run.name!r} has derived versions named {rule.name!r}: give the average another name"
    if len(run.averages) >= AVERAGES_MAX:
        return f"run {run.name!r} has {len(run.averages)} averages, the most that a run may have: remove one first"
    try:
        check_step_units([rule], run.step_units)
        names = [tensor.name for tensor in run.manifest.tensors]
        check_matches([rule], names, [average.rule for average in run.averages])
    except LocalProtocolError as error:
        return str(error)
    return None
