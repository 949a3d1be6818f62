"""Adds averages to a run that streams, and removes them. The averager's thread alone calls it, between two snapshots.

Comes in: ADD and REMOVE jobs. Goes out: an answer, once what was asked is durable. How a generation is made, `flights`
knows. What cannot be made durable does not happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ema_proto.averages.rules import AverageSpec, check_matches
from ema_proto.averages.step_units import check_step_units
from ema_proto.errors import LocalProtocolError
from ema_proto.limits import AVERAGES_MAX
from ema_server.averager.active_run import ActiveRun, Outcome, PublishRequest
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import AddAverage, Changed, Durable, RemoveAverage, Unchanged, WhyNot
from ema_server.averager.publish import Publications
from ema_server.compute.device import Device
from ema_server.rules.ledger import Ledger
from ema_server.runs.average import Average, needed_nbytes, new_average
from ema_server.runs.run import Run


@dataclass(slots=True)
class AverageEditor:
    """Changes which averages a run has."""

    courses: ActiveRuns
    flights: Publications
    device: Device

    def add(self, course: ActiveRun, run: Run, job: AddAverage) -> None:
        """Add an average that begins with the next snapshot."""
        refused = self._objection(run, job.rule)
        if refused is not None:
            job.reply(refused)
            return
        try:
            added = new_average(run.manifest, job.rule, Ledger(run.last_step or 0), self.device)
        except MemoryError as error:
            needed = needed_nbytes(run.manifest, job.rule)
            text = f"average {job.rule.name!r} of run {run.name!r} needs {needed} bytes of memory: {error}"
            job.reply(Unchanged(WhyNot.OUT_OF_MEMORY, text))
            return
        run.add(added)

        def land(outcome: Outcome) -> None:
            if isinstance(outcome, Durable):
                job.reply(Changed(job.rule.name))
            else:
                self._drop(course, added)
                job.reply(Unchanged(WhyNot.NOT_DURABLE, f"average {job.rule.name!r} was not added: {outcome.text}"))

        self._publish(course, land)

    def remove(self, course: ActiveRun, run: Run, job: RemoveAverage) -> None:
        """Remove an average, and free its memory once that is durable."""
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
        run.leave(found)

        def land(outcome: Outcome) -> None:
            if isinstance(outcome, Durable):
                self._drop(course, found)
                job.reply(Changed(job.average))
            else:
                run.stay(found)
                self.courses.show(course)
                job.reply(Unchanged(WhyNot.NOT_DURABLE, f"average {job.average!r} was not removed: {outcome.text}"))

        self._publish(course, land)

    def _publish(self, course: ActiveRun, land: Callable[[Outcome], None]) -> None:
        self.courses.show(course)
        self.flights.publish(course, PublishRequest("change", land))

    def _drop(self, course: ActiveRun, average: Average) -> None:
        if course.run is not None:
            course.run.drop(average)
            self.device.trim()
            self.courses.show(course)

    def _objection(self, run: Run, rule: AverageSpec) -> Unchanged | None:
        if run.last_step is None:
            text = f"run {run.name!r} has had no snapshot yet: add {rule.name!r} after its first one"
            return Unchanged(WhyNot.CONFLICT, text)
        if any(average.rule.name.lower() == rule.name.lower() for average in run.averages):
            text = f"run {run.name!r} has an average {rule.name!r}: remove it first, or give the new one another name"
            return Unchanged(WhyNot.CONFLICT, text)
        if rule.name.lower() in map(str.lower, self.courses.catalog.derived_averages(run.name)):
            text = f"run {run.name!r} has derived versions named {rule.name!r}: give the average another name"
            return Unchanged(WhyNot.CONFLICT, text)
        if len(run.averages) >= AVERAGES_MAX:
            text = f"run {run.name!r} has {len(run.averages)} averages, the most that a run may have: remove one first"
            return Unchanged(WhyNot.CONFLICT, text)
        try:
            check_step_units([rule], run.step_units)
            names = [tensor.name for tensor in run.manifest.tensors]
            check_matches([rule], names, [average.rule for average in run.averages])
        except LocalProtocolError as error:
            return Unchanged(WhyNot.CONFLICT, str(error))
        return None
