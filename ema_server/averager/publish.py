"""How a run's state becomes a generation: begun here, written by the pool's pass, completed by the publisher.

Comes in: wants. Goes out: orders for the publisher, and an answer for every want. The averager's thread alone calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ema_server.averager.active_run import ActiveRun, OpenDraft, Outcome, PendingGeneration, PublishRequest
from ema_server.averager.inbox import Inbox, PublishDone
from ema_server.averager.jobs import Durable, Failed, Reason
from ema_server.compute.pool import WorkerPool
from ema_server.publishing.commit import Content
from ema_server.publishing.publisher import Flight, LinkOrder, Publisher, PublishResult, SealOrder
from ema_server.publishing.writer import DraftAverage, GenerationWriter
from ema_server.runs.average import Holding
from ema_server.runs.run import Run
from ema_server.storage.catalog import Generation
from ema_server.storage.generation import AVERAGES_FOLDER, WINDOWS_FOLDER
from ema_server.storage.records import RunRecord

RETRY_AFTER_S = 10.0  # long enough for someone to delete something, short enough to lose little

logger = logging.getLogger("ema")


@dataclass(slots=True)
class Publications:
    """Begins and completes generations. `show` updates the status store; `announce` is called when it is durable."""

    publisher: Publisher
    inbox: Inbox
    pool: WorkerPool
    clock: Callable[[], float]
    show: Callable[[ActiveRun], None]
    announce: Callable[[str, int], None]

    def publish(self, course: ActiveRun, want: PublishRequest) -> None:
        """Answer `want` once the run as it stands is durable."""
        airborne = course.airborne
        if course.run is None or course.last_step is None:
            want.then(Durable(None, (), new=False))
        elif airborne is not None and _covers(airborne, want) and airborne.mark == course.run.mark:
            airborne.wants.append(want)
        else:
            course.waiting.append(want)
            if course.is_quiet:
                self._begin(course, course.run)

    def link(
        self,
        course: ActiveRun,
        source: Generation,
        reason: Reason,
        amend: Callable[[RunRecord], RunRecord],
        land: Callable[[PublishResult], None],
    ) -> None:
        """Make an older generation the newest, with an amended record. The run must be quiet; memory stays as it is."""
        flight = Flight(course.name, course.take_seq(), reason, pinned=source.pinned, finished=False)
        course.airborne = PendingGeneration(None, source.pinned, False, land, [])
        self.publisher.submit(LinkOrder(flight, source, amend, trusts=False, done=self._lander(course)))

    def write_alone(self, course: ActiveRun) -> None:
        """Write a boarding generation without a snapshot to ride on."""
        if course.boarding is None or course.run is None:
            return
        forms = [holding.form for holding in course.run.holdings]
        self.pool.write(course.run.segments, forms, course.boarding.draft)
        self.take_off(course)

    def take_off(self, course: ActiveRun) -> None:
        """The pass has written the boarding generation: hand it to the publisher."""
        if course.boarding is not None:
            order, course.boarding = course.boarding.order, None
            self.publisher.submit(order)

    def land(self, course: ActiveRun, landed: PublishResult) -> None:
        """Take note of what the publisher did, answer who waits for it, and begin anew if more is wanted."""
        airborne, course.airborne = course.airborne, None
        if airborne is None:
            return
        if landed.generation is not None:
            course.generation, course.publish_error = landed.generation, None
        airborne.land(landed)
        if course.waiting and course.run is not None and course.is_quiet:
            self._begin(course, course.run)

    def _begin(self, course: ActiveRun, run: Run) -> None:
        wants, course.waiting = course.waiting, []
        pinned, finished = any(want.pins for want in wants), any(want.finishes for want in wants)
        newest, last_step = course.generation, run.last_step
        if course.has_news or newest is None or last_step is None:
            self._board(course, run, wants, pinned, finished)
        elif course.is_changed or (pinned and not newest.pinned) or (finished and not newest.finished):
            flight = Flight(course.name, course.take_seq(), wants[0].reason, pinned, finished)
            self._lift(course, run, wants, pinned, finished)
            record = run.record(last_step)
            self.publisher.submit(LinkOrder(flight, newest, lambda _: record, trusts=True, done=self._lander(course)))
        else:
            _answer(wants, Durable(newest.step, newest.versions, new=False))

    def _board(self, course: ActiveRun, run: Run, wants: list[PublishRequest], pinned: bool, finished: bool) -> None:
        flight = Flight(course.name, course.take_seq(), wants[0].reason, pinned, finished)
        draft = self._draft(run, flight.seq)
        content = Content(run.record(run.last_step or 0), run.manifest, run.config)
        self._lift(course, run, wants, pinned, finished)
        course.begun_at, course.begun_step = self.clock(), content.record.step
        course.boarding = OpenDraft(draft, SealOrder(flight, draft, content, self._lander(course)))
        if not self.inbox.apply_is_next(course.name):
            self.write_alone(course)

    def _draft(self, run: Run, seq: int) -> GenerationWriter:
        folder = self.publisher.data_dir.temporary(run.name, f"{seq:08d}")
        averages = (
            DraftAverage(_folder(folder, holding) / average.rule.name, holding.memory, holding.files)
            for average in run.averages
            for holding in average.holdings
        )
        return GenerationWriter(folder, tuple(averages))

    def _lift(self, course: ActiveRun, run: Run, wants: list[PublishRequest], pinned: bool, finished: bool) -> None:
        mark, is_new = run.mark, course.has_news

        def land(landed: PublishResult) -> None:
            generation = landed.generation
            if generation is None:
                course.publish_error, course.retry_at = landed.error, self.clock() + RETRY_AFTER_S
                self.show(course)
                _answer(wants, Failed(landed.error))
                return
            course.saved = mark
            logger.info("run %s: step %d is published (%s)", course.name, generation.step, wants[0].reason)
            self.show(course)
            self.announce(course.name, generation.step)
            _answer(wants, Durable(generation.step, generation.versions, new=is_new))

        course.airborne = PendingGeneration(mark, pinned, finished, land, wants)

    def _lander(self, course: ActiveRun) -> Callable[[PublishResult], None]:
        inbox, name = self.inbox, course.name
        return lambda landed: inbox.put(PublishDone(name, landed))


def _folder(generation: Path, holding: Holding) -> Path:
    return generation / (WINDOWS_FOLDER if holding.is_snapshot else AVERAGES_FOLDER)


def _covers(airborne: PendingGeneration, want: PublishRequest) -> bool:
    return (airborne.pinned or not want.pins) and (airborne.finished or not want.finishes)


def _answer(wants: list[PublishRequest], outcome: Outcome) -> None:
    for want in wants:
        want.then(outcome)
