"""A run in memory with a session: its status, its schedule, and the state machine that publishes it.

Only the averager's thread uses it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from ema_proto.averages.rules import PowerEma
from ema_proto.limits import SLOTS
from ema_server.averager.jobs import Durable, Failed, JobQueue, Outcome, Reason
from ema_server.averager.status import average_status
from ema_server.compute.device import Device
from ema_server.compute.pool import WorkerPool
from ema_server.config import ServerConfig
from ema_server.publishing.commit import Content
from ema_server.publishing.publisher import CommitOrder, LinkOrder, Publisher, PublishResult
from ema_server.publishing.ring import Ring
from ema_server.publishing.writer import DraftAverage, GenerationWriter
from ema_server.runs.run import Run
from ema_server.runs.status_store import NonFiniteBuffers, Quarantine, RunState, RunStatus, StatusStore
from ema_server.storage.catalog import Catalog, FileEntry, Generation
from ema_server.storage.companions import CompanionStore
from ema_server.storage.datadir import DataDir
from ema_server.storage.generation import AVERAGES_FOLDER, WINDOWS_FOLDER
from ema_server.storage.records import GenerationInfo, RunRecord, rfc3339
from ema_server.telemetry import Telemetry

FIRST_S = 10.0  # a run's first generation comes this early: a trainer can go back to nothing earlier
RETRY_AFTER_S = 10.0  # time to make room on a full disk, while little is lost

_RATE_SAMPLES = 64

logger = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class Resources:
    """What the runs share. `clock` gives monotonic seconds, `wall` seconds since the epoch.

    `unlocked()` is a context for long work on memory or files that no other thread knows: other runs are served
    meanwhile. `announce(run, step)` is called for every generation that becomes durable. `erase(run, folder)` is called
    for every deleted run, whose folder has been renamed to `folder`.
    """

    config: ServerConfig
    data_dir: DataDir
    catalog: Catalog
    companions: CompanionStore
    ring: Ring
    publisher: Publisher
    statuses: StatusStore
    telemetry: Telemetry
    device: Device
    pool: WorkerPool
    queue: JobQueue
    clock: Callable[[], float]
    wall: Callable[[], float]
    unlocked: Callable[[], AbstractContextManager[None]]
    announce: Callable[[str, int], None]
    erase: Callable[[str, Path], None]

    def now(self) -> str:
        """The time in RFC 3339."""
        return rfc3339(self.wall())


class Phase(Enum):
    """Where a run is on the way to its next generation."""

    IDLE = auto()  # no generation is in progress
    DRAFTING = auto()  # a draft is open, which the next pass over the averages writes
    COMMITTING = auto()  # the publisher makes it durable
    REWINDING = auto()  # the publisher makes an older generation the newest; the run's jobs wait


@dataclass(frozen=True, slots=True)
class PublishRequest:
    """A request that the run's current state becomes durable. `reply` is called on the averager's thread."""

    reason: Reason
    reply: Callable[[Outcome], None] = lambda outcome: None


@dataclass(frozen=True, slots=True)
class PendingGeneration:
    """A generation that is drafted or committed: its order, the run's mark that it holds, and who waits for it."""

    order: CommitOrder | LinkOrder
    mark: tuple[int, int]
    adds_versions: bool
    requests: list[PublishRequest]

    def covers(self, request: PublishRequest, mark: tuple[int, int]) -> bool:
        """Whether this generation is also what `request` asks for, of a run with this mark."""
        info = self.order.info
        is_pinned = info.pinned or request.reason != "checkpoint"
        return self.mark == mark and is_pinned and (info.finished or request.reason != "finish")


@dataclass(frozen=True, slots=True)
class PendingRewind:
    """The rewind to `step` or before. `done` is called with None, or with why it failed.

    `is_loaded`: the run's memory is that of the older generation already.
    """

    step: int
    is_loaded: bool
    done: Callable[[Failed | None], None]


class Rate:
    """Mean steps per second over the newest 64 snapshots."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)
        self._late = 0

    def add(self, now: float, step: int) -> None:
        if self._late:
            self._late -= 1
        else:
            self._samples.append((now, step))

    def reset(self, *, reconnected: bool = False) -> None:
        """Begin again. A trainer that has reconnected first sends what waited in its slots, which says nothing."""
        self._samples.clear()
        self._late = SLOTS if reconnected else 0

    def steps_per_second(self) -> float | None:
        """The rate, None before there are two samples."""
        if len(self._samples) < 2:
            return None
        (first_at, first_step), (last_at, last_step) = self._samples[0], self._samples[-1]
        return (last_step - first_step) / (last_at - first_at) if last_at > first_at else None


@dataclass(slots=True)
class ActiveRun:
    """A run in memory.

    `session` counts joins, so that an answer meant for an earlier one can be recognized. `departed`: the session is
    over. `refused` counts the snapshots quarantined since the last applied one. `failure` is the internal error after
    which the averages can no longer be trusted. `saved` is the run's mark that `generation`, the newest one, holds.
    `publish_every_steps` is what the trainer asks for; `is_held_back`: some of that would have been too early.
    """

    resources: Resources
    run: Run
    next_seq: int
    generation: Generation | None
    saved: tuple[int, int]
    begun_at: float
    begun_step: int
    rate: Rate = field(default_factory=Rate)
    state: RunState = RunState.WAITING
    session: int = 0
    departed: bool = False
    quarantine: Quarantine | None = None
    refused: int = 0
    nonfinite_buffers: NonFiniteBuffers | None = None
    failure: str | None = None
    publish_every_steps: int | None = None
    is_held_back: bool = False
    phase: Phase = Phase.IDLE
    pending: PendingGeneration | None = None
    rewind: PendingRewind | None = None
    requests: list[PublishRequest] = field(default_factory=list)
    publish_error: str | None = None
    retry_at: float = 0.0

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def is_idle(self) -> bool:
        return self.phase is Phase.IDLE

    @property
    def is_changed(self) -> bool:
        """Whether memory holds more than the newest generation, and may be published."""
        return self.failure is None and self.run.mark != self.saved

    # The state machine. IDLE -> publish -> DRAFTING -> commit_draft -> COMMITTING -> on_published -> IDLE. A generation
    # that adds no snapshot links the files of the newest one: it goes from IDLE to COMMITTING. A rewind goes from IDLE
    # to REWINDING and back.

    def publish(self, request: PublishRequest) -> None:
        """Answer `request` once the run's current state is durable."""
        if not self.run.files_are_planned:
            with self.resources.unlocked():
                self.run.plan_files()
        if self.run.last_step is None:
            request.reply(Durable(None, (), new=False))
        elif self.pending is not None and self.pending.covers(request, self.run.mark):
            self.pending.requests.append(request)
        else:
            self.requests.append(request)
            if self.is_idle:
                self._begin(self.run.last_step)

    @property
    def draft(self) -> GenerationWriter | None:
        """The open draft, which the next pass over the averages writes."""
        order = self.pending.order if self.pending is not None and self.phase is Phase.DRAFTING else None
        return order.draft if isinstance(order, CommitOrder) else None

    def write_draft(self) -> None:
        """Write an open draft now, without a snapshot."""
        draft = self.draft
        if draft is not None:
            forms = [holding.form for holding in self.run.holdings]
            self.resources.pool.write(self.run.segments, forms, draft)
            self.commit_draft()

    def commit_draft(self) -> None:
        """Hand an open draft, which a pass has written, to the publisher."""
        if self.pending is not None and self.phase is Phase.DRAFTING:
            self.phase = Phase.COMMITTING
            self.resources.publisher.submit(self.pending.order)

    def on_published(self, result: PublishResult) -> None:
        """Take the publisher's result, answer who waits for it, and begin the next generation if one is requested."""
        self.phase, pending = Phase.IDLE, self.pending
        if pending is None:
            return
        outcome: Outcome
        if result.generation is None:
            self.publish_error, self.retry_at = result.error, self.resources.clock() + RETRY_AFTER_S
            outcome = Failed(result.error)
            if result.broken:
                self.generation = None  # its files cannot be linked again: the next one is written from memory
            self.show()
        else:
            self.generation, self.saved, self.publish_error = result.generation, pending.mark, None
            step, versions = result.generation.step, result.generation.versions
            logger.info("run %s: step %d is published (%s)", self.name, step, pending.order.info.reason)
            outcome = Durable(step, versions, new=pending.adds_versions)
            self.show()
            self.resources.announce(self.name, step)
        self.pending = None
        _answer(pending.requests, outcome)
        if self.requests and self.is_idle and self.run.last_step is not None:
            self._begin(self.run.last_step)

    def use_files(self, files: tuple[FileEntry, ...]) -> None:
        """Publish every later snapshot with these companion files, which are in the store."""
        self.run.files = files
        self.resources.companions.claim(self.name, files)

    def begin_rewind(self, source: Generation, record: RunRecord, rewind: PendingRewind) -> None:
        """Have the publisher make `source` the newest generation, recorded as `record`. The run must be idle."""
        self.phase, self.rewind = Phase.REWINDING, rewind
        info = self._info("rewind", pinned=source.pinned, finished=False)
        self.resources.publisher.submit(LinkOrder(self.name, info, source, record, verified=rewind.is_loaded))

    def fail(self, text: str) -> None:
        """Publish nothing more of it: its averages may be half updated. Everyone who waits gets the text.

        What the publisher has already been given was written before, and becomes durable.
        """
        self.failure, self.departed = text, True
        waiting, self.requests = self.requests, []
        if self.draft is not None:
            self.draft.discard()
            self.phase = Phase.IDLE
        if self.pending is not None and self.is_idle:
            waiting = [*self.pending.requests, *waiting]
            self.pending = None
        _answer(waiting, Failed(text))
        rewind, self.rewind = self.rewind, None
        if rewind is not None:
            rewind.done(Failed(text))

    def due_reason(self, now: float) -> Reason | None:
        """Why the schedule asks for a generation at `now` (monotonic seconds); None while it does not."""
        config, last_step = self.resources.config, self.run.last_step
        if last_step is None or not self.is_changed or not self.is_idle:
            return None
        if self.publish_error is not None and now < self.retry_at:
            return None
        every_s = config.publish_every_seconds if self.generation else min(config.publish_every_seconds, FIRST_S)
        every_steps, ring_at = config.publish_every_steps, self._ring_due_at()
        is_due = (
            self.publish_error is not None
            or self.departed
            or (every_s and now - self.begun_at >= every_s)
            or (every_steps and last_step - self.begun_step >= every_steps)
            or (ring_at is not None and last_step >= ring_at)
            or self._trainer_asks(now, last_step)
        )
        return "schedule" if is_due else None

    def warning(self) -> str | None:
        """What the user of the run should know when it is finished; None if there is nothing."""
        texts = [f"average {a.name}: {a.warning}" for a in self.status().averages if a.warning is not None]
        if self.is_held_back:
            texts.append(self._held_back_text())
        return "; ".join(texts) or None

    def show(self) -> None:
        self.resources.statuses.set(self.status())

    def status(self) -> RunStatus:
        run = self.run
        return RunStatus(
            run=run.name,
            state=self.state,
            created=run.created,
            step=run.last_step,
            published_step=self.generation.step if self.generation is not None else None,
            first_step=run.first_step,
            every=run.every,
            steps_per_second=self.rate.steps_per_second() if self.state is RunState.ACTIVE else None,
            applied=run.applied,
            gap_steps=run.gap_steps + run.open_gap,
            quarantined=run.quarantined,
            quarantine=self.quarantine,
            nonfinite_buffers=self.nonfinite_buffers,
            exempt=tuple(sorted(run.exempt)),
            tensors=len(run.manifest.tensors),
            snapshot_bytes=run.manifest.nbytes,
            memory_bytes=run.memory_bytes,
            publish_error=self.publish_error,
            averages=tuple(average_status(a, a.rule, a.ledger, run.step_units, run.open_gap) for a in run.averages),
            publish_every_seconds=self.resources.config.publish_every_seconds or None,
            publish_every_steps=self._fewest_steps(),
        )

    def _begin(self, step: int) -> None:
        requests = self.requests
        reasons = {request.reason for request in requests}
        pinned, finished = "checkpoint" in reasons, "finish" in reasons
        newest = self.generation
        if newest is None or self.run.applied != self.saved[0]:
            self._open_draft(step, self._info(requests[0].reason, pinned=pinned, finished=finished), requests)
        elif self.is_changed or (pinned and not newest.pinned) or (finished and not newest.finished):
            info = self._info(requests[0].reason, pinned=pinned, finished=finished)
            order = LinkOrder(self.name, info, newest, self.run.record(step), verified=True)
            self.pending, self.requests = PendingGeneration(order, self.run.mark, False, requests), []
            self.phase = Phase.COMMITTING
            self.resources.publisher.submit(order)
        else:
            self.requests = []
            _answer(requests, Durable(newest.step, newest.versions, new=False))

    def _open_draft(self, step: int, info: GenerationInfo, requests: list[PublishRequest]) -> None:
        run = self.run
        folder = self.resources.data_dir.temporary(run.name, f"{info.seq:08d}")
        averages = (
            DraftAverage(
                folder / (WINDOWS_FOLDER if holding.is_snapshot else AVERAGES_FOLDER) / average.rule.name,
                holding.memory,
                holding.files,
            )
            for average in run.averages
            for holding in average.holdings
        )
        companions = self.resources.companions.sources(run.name, run.files)
        content = Content(run.record(step), run.manifest, run.config, companions)
        order = CommitOrder(run.name, info, GenerationWriter(folder, tuple(averages)), content)
        self.pending, self.requests = PendingGeneration(order, run.mark, True, requests), []
        self.phase = Phase.DRAFTING
        self.begun_at, self.begun_step = self.resources.clock(), step
        if not self.resources.queue.snapshot_is_next(run.name):
            self.write_draft()

    def _info(self, reason: Reason, *, pinned: bool, finished: bool) -> GenerationInfo:
        """Describe the next generation; its number is used once."""
        self.next_seq += 1
        return GenerationInfo(self.next_seq - 1, self.resources.now(), reason, pinned, finished)

    def _fewest_steps(self) -> int | None:
        """After how many steps a generation is due: the server's, the trainer's or the ring's number, or None."""
        ring = self.resources.ring.every_steps if self._has_power_average() else None
        given = (self.resources.config.publish_every_steps, self.publish_every_steps, ring)
        return min((steps for steps in given if steps), default=None)

    def _trainer_asks(self, now: float, last_step: int) -> bool:
        if self.publish_every_steps is None or last_step - self.begun_step < self.publish_every_steps:
            return False
        is_early = now - self.begun_at < self.resources.config.publish_min_seconds
        if is_early and not self.is_held_back:
            self.is_held_back = True
            logger.info("run %s: %s", self.name, self._held_back_text())
        return not is_early

    def _held_back_text(self) -> str:
        return (
            f"there are fewer versions than publish_every_steps={self.publish_every_steps} asks for, as the server "
            f"makes them at least {self.resources.config.publish_min_seconds:g} s apart (--publish-min-seconds)"
        )

    def _ring_due_at(self) -> int | None:
        return self.resources.ring.due_at(self.name, self.begun_step) if self._has_power_average() else None

    def _has_power_average(self) -> bool:
        return any(isinstance(average.rule, PowerEma) for average in self.run.averages)


def _answer(requests: list[PublishRequest], outcome: Outcome) -> None:
    for request in requests:
        request.reply(outcome)
