"""The averager thread: the only writer of averages and of the status store.

It takes one job after another, and between them begins what the schedule asks for. It knows no sockets and no HTTP, and
writes files only through the pool's pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ema_proto.averages.rules import PowerEma
from ema_server.averager.active_run import ActiveRun, Outcome, PublishRequest
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.apply import SnapshotApplier
from ema_server.averager.change import AverageEditor
from ema_server.averager.inbox import Inbox, Item, PublishDone, Stop
from ema_server.averager.jobs import (
    AddAverage,
    Apply,
    Durable,
    Failed,
    Finish,
    Job,
    Join,
    Leave,
    Publish,
    Quarantined,
    RemoveAverage,
    Rewind,
    Unchanged,
    WhyNot,
)
from ema_server.averager.join import JoinHandler
from ema_server.averager.publish import Publications
from ema_server.averager.schedule import is_due
from ema_server.compute.cuda import unusable
from ema_server.compute.device import HOST, Device
from ema_server.compute.kernel_choice import choose
from ema_server.compute.pool import WorkerPool
from ema_server.config import ServerConfig
from ema_server.publishing.publisher import Publisher
from ema_server.runs.status_store import RunState, StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.telemetry import Telemetry

THREAD_NAME = "averager"

_TICK_S = 0.5  # how late a heartbeat or a schedule may be
_TICK_S_MIN = 0.01  # a schedule of nanoseconds must not keep a core busy

logger = logging.getLogger("ema")


class Averager:
    """Keeps the averages of all runs.

    Args:
        config: the schedule.
        catalog: filled from the disk at `start`.
        publisher: started and stopped with the averager.
        statuses: where statuses are shown.
        telemetry: where to count.
        device: where the averages are kept.
        clock: monotonic seconds.

    Raises:
        KernelUnavailableError: the kernel that is asked for cannot be had; the text says why.
        DeviceError: the device has no room to compute with.
    """

    def __init__(
        self,
        config: ServerConfig,
        catalog: Catalog,
        publisher: Publisher,
        statuses: StatusStore,
        telemetry: Telemetry,
        *,
        device: Device = HOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._telemetry = telemetry
        self._clock = clock
        self._inbox = Inbox()
        self._publisher = publisher
        self._listeners: list[Callable[[str, int], None]] = []
        arithmetic = choose(config.kernel, device.torch_device)
        self._device = device
        try:
            self._crew = WorkerPool(device.workers, device.block_elements, device, arithmetic)
        except (RuntimeError, MemoryError) as error:
            raise unusable(device.name, error) from None
        self.kernel = arithmetic.name
        self._courses = ActiveRuns(catalog, statuses, publisher, clock)
        self._flights = Publications(publisher, self._inbox, self._crew, clock, self._courses.show, self._announce)
        self._admission = JoinHandler(self._courses, self._flights, device)
        self._changing = AverageEditor(self._courses, self._flights, device)
        self._applying = SnapshotApplier(self._courses, self._flights, self._crew, telemetry)
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._deadline = 0.0

    def is_alive(self) -> bool:
        """Whether its thread and the publisher's run."""
        return self._thread.is_alive() and self._publisher.is_alive()

    def listen(self, listener: Callable[[str, int], None]) -> None:
        """Call `listener(run, step)` for every generation that becomes durable. Before `start`; it must not block."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Find what is on the disk, then start.

        Raises:
            OSError: the data folder cannot be read.
        """
        self._courses.restore()
        self._publisher.start()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Any thread; never blocks."""
        self._inbox.put(job)

    def stop(self, timeout_s: float) -> bool:
        """Publish every changed run and end both threads; returns whether all of that was done in time."""
        self._deadline = self._clock() + timeout_s
        self._inbox.put(Stop())
        self._thread.join(timeout_s)
        left_s = max(self._deadline - self._clock(), 0.0)
        in_time = self._publisher.stop(left_s) and not self._thread.is_alive()
        return in_time and not any(course.is_changed for course in self._courses.all())

    def _work(self) -> None:
        tick_s = max(min(_TICK_S, self._config.publish_every_seconds or _TICK_S), _TICK_S_MIN)
        while True:
            self._telemetry.beat(THREAD_NAME)
            self._telemetry.inbox_jobs.set(len(self._inbox))
            item = self._inbox.take(tick_s)
            if isinstance(item, Stop):
                break
            if item is not None:
                self._take(item)
            self._publish_due()
        self._publish_all()
        self._crew.close()

    def _take(self, item: Item) -> None:
        if isinstance(item, Stop):
            return
        course = self._courses.get(item.run)
        if isinstance(item, PublishDone):
            if course is not None:
                self._flights.land(course, item.landed)
                self._release(course)
        elif course is not None and (course.held or course.barrier):
            course.held.append(item)
        else:
            self._carry_out(course, item)
        self._settle(item.run)

    def _release(self, course: ActiveRun) -> None:
        """Carry out the jobs that were held, until one of them is held again."""
        while course.held and not course.barrier:
            job = course.held.popleft()
            self._carry_out(course, job)
            if course.held and course.held[0] is job:
                return
            course = self._courses.get(job.run) or course

    def _settle(self, name: str) -> None:
        course = self._courses.get(name)
        if course is not None:
            self._courses.settle(course)
        if self._courses.get(name) is None:
            self._device.trim()

    def _carry_out(self, course: ActiveRun | None, job: Job) -> None:
        if course is not None and not isinstance(job, Apply | Publish):
            self._flights.write_alone(course)  # what follows may change the run, or ask for it to stand still
        match job:
            case Join():
                self._admission.join(job)
            case Apply():
                self._apply(course, job)
            case Publish():
                self._publish(course, job)
            case Rewind():
                self._rewind(course, job)
            case Finish():
                self._finish(course, job)
            case Leave():
                self._leave(course, job)
            case AddAverage() | RemoveAverage():
                self._change(course, job)

    def _apply(self, course: ActiveRun | None, job: Apply) -> None:
        if course is None or course.run is None:
            job.reply(Quarantined(job.step, f"run {job.run!r} is not in memory: join it again"))
        else:
            self._applying.apply(course, course.run, job, self._clock())

    def _publish(self, course: ActiveRun | None, job: Publish) -> None:
        if course is not None and course.run is not None:
            self._flights.publish(course, PublishRequest(job.reason, job.reply))
            return
        newest = next(iter(self._courses.catalog.generations(job.run)), None)
        if newest is None:
            job.reply(Failed(f"run {job.run!r} is not known"))
        else:
            job.reply(Durable(newest.step, newest.versions, new=False))

    def _rewind(self, course: ActiveRun | None, job: Rewind) -> None:
        if course is None or course.run is None:
            job.reply(Failed(f"run {job.run!r} is not in memory: join it first"))
        else:
            self._admission.rewind(course, course.run, job)

    def _finish(self, course: ActiveRun | None, job: Finish) -> None:
        if course is None or course.run is None:
            job.reply(Failed(f"run {job.run!r} is not in memory: join it first"))
            return
        session = course.session

        def finished(outcome: Outcome) -> None:
            if isinstance(outcome, Durable) and course.session == session:
                course.state, course.departed = RunState.FINISHED, True
                self._courses.show(course)
            job.reply(outcome)

        self._flights.publish(course, PublishRequest("finish", finished))

    def _leave(self, course: ActiveRun | None, job: Leave) -> None:
        if course is None or course.run is None or course.departed:
            return
        course.state, course.departed = RunState.LOST if job.lost else RunState.WAITING, True
        self._courses.show(course)
        if course.is_changed:
            self._flights.publish(course, PublishRequest("lost" if job.lost else "leave", lambda _: None))

    def _change(self, course: ActiveRun | None, job: AddAverage | RemoveAverage) -> None:
        if course is None or course.run is None or course.departed:
            text = f"run {job.run!r} has no trainer: its averages are changed while one streams"
            job.reply(Unchanged(WhyNot.NOT_STREAMING, text))
        elif isinstance(job, AddAverage):
            self._changing.add(course, course.run, job)
        else:
            self._changing.remove(course, course.run, job)

    def _publish_due(self) -> None:
        now = self._clock()
        for course in self._courses.all():
            reason = is_due(course, self._config, now, self._ring_due_at(course))
            if reason is not None:
                self._flights.publish(course, PublishRequest(reason, lambda _: None))

    def _ring_due_at(self, course: ActiveRun) -> int | None:
        rules = () if course.run is None else (average.rule for average in course.run.averages)
        if not any(isinstance(rule, PowerEma) for rule in rules):
            return None
        return self._publisher.ring.due_at(course.name, course.begun_step)

    def _publish_all(self) -> None:
        """Make everything durable once, then wait for it until the deadline."""
        wanted: set[str] = set()
        while self._clock() < self._deadline:
            for course in self._courses.all():
                self._flights.write_alone(course)
                if course.is_quiet and course.is_changed and course.name not in wanted:
                    wanted.add(course.name)
                    self._flights.publish(course, PublishRequest("shutdown", lambda _: None))
            if all(course.is_quiet for course in self._courses.all()):
                return
            item = self._inbox.take(min(_TICK_S, max(self._deadline - self._clock(), 0.0)))
            if isinstance(item, PublishDone):
                self._take(item)

    def _announce(self, run: str, step: int) -> None:
        for listener in self._listeners:
            listener(run, step)
