"""Lets trainers in: carries out what `joining` decided, and rewinds. The averager's thread alone calls it.

Comes in: JOIN and REWIND jobs. Goes out: runs in memory, and answers. How a generation is made, `flights` knows. A job
that must wait for a generation in the making goes back to the head of the run's held jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from ema_proto.errors import RejectCode
from ema_proto.wire.manifest import Manifest
from ema_proto.wire.messages import Continuation
from ema_server.averager.active_run import ActiveRun, Outcome, PublishRequest
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.jobs import Durable, Failed, Join, Joined, Refused, Rewind, Rewound
from ema_server.averager.join_policy import Continue, GoBack, Known, SetAside, Start, decide
from ema_server.averager.publish import Publications
from ema_server.compute.device import Device
from ema_server.publishing.publisher import CutOrder, PublishResult
from ema_server.runs.restore import load_run
from ema_server.runs.rewind import carried_back
from ema_server.runs.run import Run, new_run
from ema_server.runs.status_store import RunState
from ema_server.storage.catalog import Generation
from ema_server.storage.records import BrokenGeneration, RunRecord, rfc3339


@dataclass(slots=True)
class JoinHandler:
    """Joins and rewinds."""

    courses: ActiveRuns
    flights: Publications
    device: Device

    def join(self, job: Join) -> None:
        """Let the session in, or say why not."""
        try:
            self._join(job)
        except MemoryError as error:
            self._refuse(job, RejectCode.OUT_OF_MEMORY, f"run {job.run!r} does not fit into the server: {error}")
        except OSError as error:
            text = f"run {job.run!r} cannot be opened on the server's disk: {error.strerror or error}"
            self._refuse(job, RejectCode.UNAVAILABLE, text)

    def rewind(self, course: ActiveRun, run: Run, job: Rewind) -> None:
        """Go back to the newest generation at or before the job's step."""
        last_step = run.last_step
        if self._waits(course, job):
            return
        if last_step is None:
            job.reply(Failed(f"run {job.run!r} has had no snapshot: there is nothing to rewind"))
        elif job.step >= last_step:
            self.flights.publish(course, PublishRequest("rewind", lambda outcome: job.reply(_as_rewound(outcome, run))))
        else:
            self._go_back(course, job.step, lambda back: job.reply(_rewound(back)))

    def _join(self, job: Join) -> None:
        match decide(job.join, self._known(job.run)):
            case Refused() as refused:
                job.reply(refused)
            case Start():
                self._start(job)
            case Continue():
                self._continue(job)
            case GoBack(step):
                course = self.courses.open(job.run)
                if not self._waits(course, job):
                    self._go_back(course, step, lambda back: self._joined_back(course, job, back))
            case SetAside():
                self._set_aside(job)

    def _known(self, name: str) -> Known | None:
        held_steps = tuple(generation.step for generation in self.courses.catalog.generations(name))
        course = self.courses.get(name)
        if course is not None and course.run is not None and course.run.last_step is not None:
            return _known(course.run.record(course.run.last_step), course.run.manifest, held_steps)
        for _, record, manifest in self.courses.readable(name):
            return _known(record.run, manifest, held_steps)
        return None

    def _start(self, job: Join) -> None:
        course = self.courses.open(job.run)
        course.run = None  # one without a snapshot may be there: its memory goes first
        run = new_run(job.join, rfc3339(self.flights.publisher.wall()), self.device)
        course.saved, course.begun_step = run.mark, run.ledger.origin
        self.flights.publisher.submit(CutOrder(course.name, -1))  # what another run of this name may have left
        self._admit(course, run, job, "new")

    def _continue(self, job: Join) -> None:
        course = self.courses.open(job.run)
        if course.run is None:
            generation = self.courses.catalog.generations(job.run)[0]
            try:
                course.run = self._load(course, generation)
            except BrokenGeneration as error:
                self.flights.publisher.set_bad(generation, error)
                self.courses.settle(course)
                self._join(job)  # what is left may lead to another decision
                return
        self._admit(course, course.run, job, "continued")

    def _set_aside(self, job: Join) -> None:
        course = self.courses.get(job.run)
        if course is not None:
            if self._waits(course, job):
                return
            if course.is_changed and course.publish_error is None:
                course.held.appendleft(job)
                self.flights.publish(course, PublishRequest("leave", lambda _: None))
                return
            if course.is_changed:
                text = f"run {job.run!r} cannot be set aside, its last steps are not on disk: {course.publish_error}"
                job.reply(Refused(RejectCode.UNAVAILABLE, text))
                return
        publisher, courses = self.flights.publisher, self.courses
        stamp = datetime.fromtimestamp(publisher.wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
        new_name = publisher.data_dir.set_run_aside(job.run, stamp)
        courses.catalog.move(job.run, new_name, publisher.data_dir.run_folder(new_name))
        courses.statuses.remove(job.run)
        courses.show_from_disk(new_name)
        publisher.offer(new_name)
        if course is not None:
            course.run, course.generation, course.next_seq = None, None, 1
        publisher.data_dir.create_run(job.run)
        self._start(job)

    def _go_back(self, course: ActiveRun, step: int, then: Callable[[Run | Failed], None]) -> None:
        target = next((g for g in self.courses.catalog.generations(course.name) if g.step <= step), None)
        if target is None:
            then(Failed(f"run {course.name!r} has no generation at or before step {step}"))
            return

        now = self._record(course)

        def land(landed: PublishResult) -> None:
            course.barrier = False
            if landed.broken:
                self._go_back(course, step, then)
            elif landed.generation is None:
                then(Failed(landed.error))
            else:
                then(self._load_or_drop(course, landed.generation))

        course.barrier = True
        amend = (lambda old: carried_back(old, now)) if now is not None else (lambda old: old)
        self.flights.link(course, target, "rewind", amend, land)

    def _record(self, course: ActiveRun) -> RunRecord | None:
        """The run as it stands, in memory or in its newest generation."""
        if course.run is not None and course.run.last_step is not None:
            return course.run.record(course.run.last_step)
        return next((record.run for _, record, _ in self.courses.readable(course.name)), None)

    def _load_or_drop(self, course: ActiveRun, generation: Generation) -> Run | Failed:
        """Load over the memory of the run; after a failure half-way nothing of it may be used."""
        try:
            course.run = self._load(course, generation)
        except (BrokenGeneration, OSError, MemoryError) as error:
            course.run, course.departed = None, True
            self.courses.show_from_disk(course.name)
            return Failed(f"the generation at step {generation.step} could not be loaded: {error}")
        self.courses.show(course)
        return course.run

    def _load(self, course: ActiveRun, generation: Generation) -> Run:
        old = course.run
        averages = {} if old is None else {average.rule.name: average for average in old.averages}
        run = load_run(generation, averages, self.device)
        if old is not None:
            run.every, run.config = old.every, old.config
            run.set_step_units(old.step_units)
        course.saved, course.generation = run.mark, generation
        course.begun_at, course.begun_step = self.courses.clock(), generation.step
        self.flights.publisher.submit(CutOrder(course.name, generation.step))
        course.rate.reset()
        return run

    def _joined_back(self, course: ActiveRun, job: Join, back: Run | Failed) -> None:
        if isinstance(back, Failed):
            self._refuse(job, RejectCode.UNAVAILABLE, f"run {job.run!r} cannot be rewound: {back.text}")
        else:
            self._admit(course, back, job, "rewound")

    def _admit(self, course: ActiveRun, run: Run, job: Join, continuation: Continuation) -> None:
        course.run, course.state, course.departed = run, RunState.ACTIVE, False
        course.session += 1
        course.quarantine = None
        course.rate.reset()
        run.every = job.join.every
        run.set_step_units(job.join.step_units)
        run.config = job.join.config if job.join.config is not None else run.config
        self.courses.show(course)
        steps = (run.last_step, course.published_step)
        job.reply(Joined(*steps, continuation, run.manifest, run.exempt, run.recent))

    def _waits(self, course: ActiveRun, job: Join | Rewind) -> bool:
        if course.is_quiet:
            return False
        course.held.appendleft(job)
        return True

    def _refuse(self, job: Join, code: RejectCode, text: str) -> None:
        job.reply(Refused(code, text))
        course = self.courses.get(job.run)
        if course is not None:
            self.courses.settle(course)


def _known(run: RunRecord, manifest: Manifest, held_steps: tuple[int, ...]) -> Known:
    averages = {average.name: average.spec for average in run.averages}
    removed = frozenset((average.name, average.spec) for average in run.removed)
    return Known(run.step, manifest, averages, held_steps, removed)


def _rewound(back: Run | Failed) -> Rewound | Failed:
    return back if isinstance(back, Failed) else Rewound(back.last_step or 0, back.recent)


def _as_rewound(outcome: Outcome, run: Run) -> Rewound | Failed:
    """A rewind to where the run stands already: nothing moves, but the answer is durable."""
    return _rewound(run) if isinstance(outcome, Durable) else outcome
