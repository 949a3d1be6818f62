"""The averager thread: the only writer of averages and of the board. Jobs come in, answers go out by their `reply`.

It takes one job after another, and between them begins what the schedule asks for. It knows no sockets and no HTTP, and
writes files only through the crew's pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ema_proto.averages import PowerEma
from ema_server.admission import Admission
from ema_server.applying import Applying
from ema_server.board import Board, RunState
from ema_server.catalog import Catalog
from ema_server.changing import Changing
from ema_server.config import ServerConfig
from ema_server.course import Course, Outcome, Want
from ema_server.courses import Courses
from ema_server.crew import Crew
from ema_server.cuda import unusable
from ema_server.device import HOST, Device
from ema_server.flights import Flights
from ema_server.inbox import Inbox, Item, Landing, Stop
from ema_server.jobs import (
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
from ema_server.kernel_choice import choose
from ema_server.publisher import Publisher
from ema_server.schedule import is_due
from ema_server.telemetry import Gauge, Telemetry

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
        board: where statuses are shown.
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
        board: Board,
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
            self._crew = Crew(device.workers, device.block_elements, device, arithmetic)
        except (RuntimeError, MemoryError) as error:
            raise unusable(device.name, error) from None
        self.kernel = arithmetic.name
        self._courses = Courses(catalog, board, publisher, clock)
        self._flights = Flights(publisher, self._inbox, self._crew, clock, self._courses.show, self._announce)
        self._admission = Admission(self._courses, self._flights, device)
        self._changing = Changing(self._courses, self._flights, device)
        self._applying = Applying(self._courses, self._flights, self._crew, telemetry)
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
            self._telemetry.set(Gauge.INBOX, len(self._inbox))
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
        if isinstance(item, Landing):
            if course is not None:
                self._flights.land(course, item.landed)
                self._release(course)
        elif course is not None and (course.held or course.barrier):
            course.held.append(item)
        else:
            self._carry_out(course, item)
        self._settle(item.run)

    def _release(self, course: Course) -> None:
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

    def _carry_out(self, course: Course | None, job: Job) -> None:
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

    def _apply(self, course: Course | None, job: Apply) -> None:
        if course is None or course.run is None:
            job.reply(Quarantined(job.step, f"run {job.run!r} is not in memory: join it again"))
        else:
            self._applying.apply(course, course.run, job, self._clock())

    def _publish(self, course: Course | None, job: Publish) -> None:
        if course is not None and course.run is not None:
            self._flights.publish(course, Want(job.reason, job.reply))
            return
        newest = next(iter(self._courses.catalog.generations(job.run)), None)
        if newest is None:
            job.reply(Failed(f"run {job.run!r} is not known"))
        else:
            job.reply(Durable(newest.step, newest.versions, new=False))

    def _rewind(self, course: Course | None, job: Rewind) -> None:
        if course is None or course.run is None:
            job.reply(Failed(f"run {job.run!r} is not in memory: join it first"))
        else:
            self._admission.rewind(course, course.run, job)

    def _finish(self, course: Course | None, job: Finish) -> None:
        if course is None or course.run is None:
            job.reply(Failed(f"run {job.run!r} is not in memory: join it first"))
            return
        session = course.session

        def finished(outcome: Outcome) -> None:
            if isinstance(outcome, Durable) and course.session == session:
                course.state, course.departed = RunState.FINISHED, True
                self._courses.show(course)
            job.reply(outcome)

        self._flights.publish(course, Want("finish", finished))

    def _leave(self, course: Course | None, job: Leave) -> None:
        if course is None or course.run is None or course.departed:
            return
        course.state, course.departed = RunState.LOST if job.lost else RunState.WAITING, True
        self._courses.show(course)
        if course.is_changed:
            self._flights.publish(course, Want("lost" if job.lost else "leave", lambda _: None))

    def _change(self, course: Course | None, job: AddAverage | RemoveAverage) -> None:
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
                self._flights.publish(course, Want(reason, lambda _: None))

    def _ring_due_at(self, course: Course) -> int | None:
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
                    self._flights.publish(course, Want("shutdown", lambda _: None))
            if all(course.is_quiet for course in self._courses.all()):
                return
            item = self._inbox.take(min(_TICK_S, max(self._deadline - self._clock(), 0.0)))
            if isinstance(item, Landing):
                self._take(item)

    def _announce(self, run: str, step: int) -> None:
        for listener in self._listeners:
            listener(run, step)
