"""The averager: the only writer of averages and of the status store.

Its thread carries out one job after another, and in between begins the generations that the schedule asks for. It
writes files only through the pool's pass over the averages.

A small snapshot that finds the averager idle, or busy with another run, is applied by the thread that submits it: to
hand it over and back would take longer, and it need not wait for the pass of a large run. JOINs are carried out by a
thread of their own, as a large run takes long to allocate or to read. A lock admits one of these threads at a time; it
is free while one of them waits for the pool, or works on what no other thread knows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ema_server.averager.active_run import ActiveRun, PublishRequest, Resources
from ema_server.averager.active_runs import ActiveRuns
from ema_server.averager.apply import apply
from ema_server.averager.change import add_average, remove_average
from ema_server.averager.delete import delete
from ema_server.averager.jobs import (
    AddAverage,
    Apply,
    DeleteRun,
    Durable,
    Failed,
    Finish,
    Item,
    Job,
    JobQueue,
    Join,
    JoinDone,
    Leave,
    Outcome,
    Publish,
    PublishDone,
    PublishDue,
    RemoveAverage,
    Reply,
    Rewind,
    Stop,
    UseFiles,
    WhyNot,
    refuse,
)
from ema_server.averager.join import join
from ema_server.averager.rewind import end_rewind, rewind
from ema_server.compute.cuda import unusable
from ema_server.compute.device import HOST, Device
from ema_server.compute.pool import INLINE_BYTES, WorkerPool
from ema_server.compute.select import choose
from ema_server.config import ServerConfig
from ema_server.publishing.publisher import Publisher
from ema_server.publishing.ring import Ring
from ema_server.runs.status_store import RunState, StatusStore
from ema_server.storage.catalog import Catalog
from ema_server.storage.companions import CompanionStore
from ema_server.storage.datadir import DataDir
from ema_server.telemetry import Telemetry

THREAD_NAME = "averager"

_TICK_S = 0.5  # how late a heartbeat or a schedule may be
# The averages of a run whose snapshots are applied by the thread that submits them, which has other runs to serve: less
# than a millisecond while the averager is idle, else some 20 ms where a large run's pass may take seconds.
_AT_ONCE_BYTES = 8 << 20
_BESIDE_BYTES = 16 << 20  # of a snapshot
_MEMORY_BESIDE_BYTES = 64 << 20
_TICK_S_MIN = 0.01  # a schedule of nanoseconds must not keep a core busy

logger = logging.getLogger("ema")


class Averager:
    """Keeps the averages of all runs, on `device`.

    It fills `catalog` from the disk at `start`, and starts and stops `publisher`. The cadence of `ring` is part of the
    schedule. `clock` gives monotonic seconds, `wall` seconds since the epoch.
    `erase` is called with a deleted run and its renamed folder, and erases what is left of it.

    Raises:
        KernelUnavailableError: the kernel that is asked for is not available; the text says why.
        DeviceError: the device has no room to compute with.
    """

    def __init__(
        self,
        config: ServerConfig,
        data_dir: DataDir,
        catalog: Catalog,
        companions: CompanionStore,
        publisher: Publisher,
        ring: Ring,
        statuses: StatusStore,
        telemetry: Telemetry,
        *,
        erase: Callable[[str, Path], None],
        device: Device = HOST,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._telemetry = telemetry
        self._device = device
        self._clock = clock
        self._publisher = publisher
        self._queue = JobQueue()
        self._busy = threading.Lock()
        self._joiner = ThreadPoolExecutor(1, "joining")
        self._listeners: list[Callable[[str, int], None]] = []
        arithmetic = choose(config.kernel, device.torch_device)
        self.kernel = arithmetic.name
        try:
            self._pool = WorkerPool(device.workers, device.block_elements, device, arithmetic, self._unlocked)
        except (RuntimeError, MemoryError) as error:
            raise unusable(device.name, error) from None
        self._runs = ActiveRuns(
            Resources(
                config=config,
                data_dir=data_dir,
                catalog=catalog,
                companions=companions,
                ring=ring,
                publisher=publisher,
                statuses=statuses,
                telemetry=telemetry,
                device=device,
                pool=self._pool,
                queue=self._queue,
                unlocked=self._unlocked,
                clock=clock,
                wall=wall,
                announce=self._announce,
                erase=erase,
            )
        )
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._deadline = 0.0

    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def listen(self, listener: Callable[[str, int], None]) -> None:
        """Call `listener(run, step)` for every generation that becomes durable. Before `start`; it must not block."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Find what is on the disk, then start.

        Raises:
            OSError: the data folder cannot be read.
        """
        self._runs.restore()
        self._publisher.start(lambda run, result: self._queue.put(PublishDone(run, result)))
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Any thread; never waits. Its `reply` is called once, on the averager's thread.

        A small snapshot may be applied, and answered, before this returns.
        """
        if not isinstance(job, Leave | UseFiles):
            reply: Reply[Any] = Reply(job.reply, self._telemetry.internal_errors.inc)
            job = replace(job, reply=reply)
        if not (isinstance(job, Apply) and self._applied_at_once(job)):
            self._queue.put(job)

    def stop(self, timeout_s: float) -> bool:
        """Publish every changed run and end both threads; returns whether all of that was done in time."""
        self._deadline = self._clock() + timeout_s
        self._queue.put(Stop())
        self._thread.join(timeout_s)
        left_s = max(self._deadline - self._clock(), 0.0)
        in_time = self._publisher.stop(left_s) and not self._thread.is_alive()
        return in_time and not any(active.is_changed for active in self._runs.all())

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread: it computes small passes itself, as a thread of the pool would
        tick_s = max(min(_TICK_S, self._config.publish_every_seconds or _TICK_S), _TICK_S_MIN)
        looked_at = self._clock()
        while True:
            self._telemetry.beat(THREAD_NAME)
            self._telemetry.inbox_jobs.set(len(self._queue))
            item = self._queue.take(tick_s)
            if isinstance(item, Stop):
                break
            with self._busy:
                if item is not None:
                    self._take(item)
                now = self._clock()
                if item is None or now - looked_at >= tick_s:
                    self._publish_due(self._runs.all(), now)
                    looked_at = now
                elif (active := self._runs.get(item.run)) is not None:
                    self._publish_due((active,), now)
            if item is not None:
                self._queue.finished(item)
        self._joiner.shutdown()
        with self._busy:
            self._publish_all()
        self._pool.close()

    def _applied_at_once(self, job: Apply) -> bool:
        """Apply a snapshot on the caller's thread, if it is small, the run's jobs are done, and no file is open."""
        is_idle = self._queue.is_idle
        if not self._pool.has_callers_worker or len(job.data) > (INLINE_BYTES if is_idle else _BESIDE_BYTES):
            return False
        if self._queue.has_unfinished(job.run) or not self._busy.acquire(blocking=False):
            return False
        try:
            active, memory_bytes = self._runs.get(job.run), _AT_ONCE_BYTES if is_idle else _MEMORY_BESIDE_BYTES
            if active is None or active.draft is not None or active.run.memory_bytes > memory_bytes:
                return False
            if self._runs.hold_if_busy(job):
                return True
            self._carry_out(job)
            with self._contained(job.run):
                if active.due_reason(self._clock()) is not None or active.failure is not None:
                    self._queue.put(PublishDue(job.run))
            return True
        finally:
            self._busy.release()

    def _join(self, job: Join) -> None:
        """Carry out a JOIN on the thread for that."""
        with self._busy:
            with self._contained(job.run, job):
                join(self._runs, job)
            self._runs.joining.discard(job.run)
            self._queue.put(JoinDone(job.run, self._runs.is_next(job)))
            active = self._runs.get(job.run)
        if active is not None:
            active.run.plan_files()

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let another thread work meanwhile."""
        self._busy.release()
        try:
            yield
        finally:
            self._busy.acquire()

    def _take(self, item: Job | PublishDone | JoinDone | PublishDue) -> None:
        if isinstance(item, PublishDone | JoinDone):
            if isinstance(item, PublishDone):
                with self._contained(item.run):
                    self._on_published(item)
            self._settle(item.run)
            if not (isinstance(item, JoinDone) and item.is_held):
                for job in self._runs.released(item.run):
                    self._carry_out(job)
        elif isinstance(item, PublishDue):
            self._settle(item.run)
        elif not self._runs.hold_if_busy(item):
            self._carry_out(item)
        self._settle(item.run)

    def _settle(self, run: str) -> None:
        with self._contained(run):
            self._runs.settle(run)
            if self._runs.get(run) is None:
                self._device.trim()

    def _on_published(self, done: PublishDone) -> None:
        active = self._runs.get(done.run)
        if active is None:
            return
        if active.rewind is not None:
            end_rewind(self._runs, active, active.rewind, done.result)
        else:
            active.on_published(done.result)

    def _carry_out(self, job: Job) -> None:
        with self._contained(job.run, job):
            self._dispatch(job)

    @contextmanager
    def _contained(self, run: str, job: Job | None = None) -> Iterator[None]:
        """Confine an unexpected error to its run and its job: other runs and the thread continue."""
        try:
            yield
        except Exception as error:
            self._telemetry.internal_errors.inc()
            logger.exception("run %s: internal error: the run is taken out of memory", run)
            text = f"internal error of the server, its log says more: {error!r}; run {run!r} has to be joined again"
            active = self._runs.get(run)
            if active is not None:
                self._runs.fail(active, text)
            if job is not None:
                refuse(job, text)

    def _dispatch(self, job: Job) -> None:
        if isinstance(job, Join):
            self._write_draft(job.run)
            self._runs.joining.add(job.run)
            self._joiner.submit(self._join, job)
            return
        if isinstance(job, DeleteRun):
            self._write_draft(job.run)
            delete(self._runs, job)
            return
        active = self._runs.get(job.run)
        if active is None:
            self._answer_from_disk(job)
            return
        if not isinstance(job, Apply | Publish):
            active.write_draft()  # what follows may change the run, or need it idle
        match job:
            case Apply():
                apply(active, job)
            case Publish():
                active.publish(PublishRequest(job.reason, job.reply))
            case Rewind():
                rewind(self._runs, active, job)
            case Finish():
                _finish(active, job)
            case Leave():
                _leave(active, job)
            case UseFiles():
                active.use_files(job.files)
            case AddAverage() | RemoveAverage() if active.departed:
                refuse(job, _not_streaming(job), WhyNot.NOT_STREAMING)
            case AddAverage():
                add_average(self._runs, active, job)
            case RemoveAverage():
                remove_average(active, job)

    def _write_draft(self, run: str) -> None:
        active = self._runs.get(run)
        if active is not None:
            active.write_draft()

    def _answer_from_disk(self, job: Job) -> None:
        if isinstance(job, Publish):
            newest = next(iter(self._runs.resources.catalog.generations(job.run)), None)
            if newest is None:
                job.reply(Failed(f"run {job.run!r} is not known"))
            else:
                job.reply(Durable(newest.step, newest.versions, new=False))
        elif isinstance(job, AddAverage | RemoveAverage):
            refuse(job, _not_streaming(job), WhyNot.NOT_STREAMING)
        else:
            refuse(job, f"run {job.run!r} is not in memory: join it again")

    def _publish_due(self, runs: Iterable[ActiveRun], now: float) -> None:
        for active in runs:
            with self._contained(active.name):
                reason = active.due_reason(now)
                if reason is not None:
                    active.publish(PublishRequest(reason))

    def _publish_all(self) -> None:
        """Make every run durable once, and wait for it until the deadline; not for a publisher that has died."""
        requested: set[str] = set()
        while self._clock() < self._deadline and self._publisher.is_alive():
            for active in self._runs.all():
                with self._contained(active.name):
                    self._publish_last(active, requested)
            if all(active.is_idle for active in self._runs.all()):
                return
            item: Item | None = self._queue.take(min(_TICK_S, max(self._deadline - self._clock(), 0.0)))
            if isinstance(item, PublishDone):
                self._take(item)

    def _publish_last(self, active: ActiveRun, requested: set[str]) -> None:
        active.write_draft()
        if active.is_idle and active.is_changed and active.name not in requested:
            requested.add(active.name)
            active.publish(PublishRequest("shutdown"))

    def _announce(self, run: str, step: int) -> None:
        for listener in self._listeners:
            listener(run, step)


def _finish(active: ActiveRun, job: Finish) -> None:
    session = active.session

    def on_published(outcome: Outcome) -> None:
        if isinstance(outcome, Durable) and active.session == session:
            active.state, active.departed = RunState.FINISHED, True
            active.show()
            outcome = replace(outcome, warning=active.warning())
        job.reply(outcome)

    active.publish(PublishRequest("finish", on_published))


def _leave(active: ActiveRun, job: Leave) -> None:
    if active.departed:
        return
    active.state, active.departed = RunState.LOST if job.lost else RunState.WAITING, True
    active.show()
    if active.is_changed:
        active.publish(PublishRequest("lost" if job.lost else "leave"))


def _not_streaming(job: AddAverage | RemoveAverage) -> str:
    return f"the averages of run {job.run!r} can only be changed while a trainer streams"
