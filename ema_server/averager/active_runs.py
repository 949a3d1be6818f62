"""The runs in memory, the jobs that wait for them, and the statuses of all runs.

One of the averager's threads uses them at a time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from ema_proto.wire.manifest import Manifest
from ema_server.averager.active_run import ActiveRun, Resources
from ema_server.averager.jobs import Job
from ema_server.averager.status import status_on_disk
from ema_server.publishing.publisher import CutRing
from ema_server.publishing.retention import expired
from ema_server.runs.restore import load_run
from ema_server.runs.run import Run
from ema_server.runs.status_store import Quarantine, RunState
from ema_server.storage.catalog import Generation
from ema_server.storage.generation import read_manifest, read_record
from ema_server.storage.records import BrokenGeneration, GenerationRecord, RunRecord

logger = logging.getLogger("ema")


class ActiveRuns:
    """The active runs by name. A run without an entry is on disk alone, or unknown.

    `joining` has the runs whose JOIN another thread carries out; their other jobs are held.
    """

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.joining: set[str] = set()
        self._by_name: dict[str, ActiveRun] = {}
        self._held: dict[str, deque[Job]] = {}

    def get(self, name: str) -> ActiveRun | None:
        return self._by_name.get(name)

    def all(self) -> tuple[ActiveRun, ...]:
        return tuple(self._by_name.values())

    def hold(self, job: Job) -> None:
        """Put a job back to the head of its run's held jobs: it needs the run idle."""
        self._held.setdefault(job.run, deque()).appendleft(job)

    def hold_if_busy(self, job: Job) -> bool:
        """Put a job behind the run's held jobs if there are any, or if no job may be carried out now."""
        if job.run not in self._held and not self._is_blocked(job.run):
            return False
        self._held.setdefault(job.run, deque()).append(job)
        return True

    def is_next(self, job: Job) -> bool:
        """Whether this job is the first of its run's held jobs."""
        held = self._held.get(job.run)
        return held is not None and len(held) > 0 and held[0] is job

    def released(self, name: str) -> Iterator[Job]:
        """The held jobs of a run in order, until one is held again."""
        held = self._held.get(name)
        while held and not self._is_blocked(name):
            job = held.popleft()
            yield job
            if held and held[0] is job:
                return
        if not held:
            self._held.pop(name, None)

    def create(self, run: Run) -> ActiveRun:
        """Have a new run in memory, in place of one of its name that never had a snapshot."""
        active = self._add(run, None)
        self.resources.publisher.submit(CutRing(run.name, -1))  # what another run of this name may have left
        return active

    def load(self, generation: Generation, record: RunRecord) -> ActiveRun:
        """Read a run into memory from the files of `generation`, as `record` describes it.

        Raises:
            BrokenGeneration: a file of the generation is not what it should be.
            OSError: the disk fails.
            MemoryError: the device has not enough.
        """
        with self.resources.unlocked():
            run = load_run(generation, {}, self.resources.device, record)
        for version in generation.versions[:1]:  # all of them have the same
            run.files = self.resources.companions.adopt(run.name, version)
        return self._add(run, generation)

    def reload(self, active: ActiveRun, generation: Generation) -> None:
        """Read `generation` over the memory of the run. After an error nothing in that memory may be used.

        Raises:
            BrokenGeneration, OSError, MemoryError: as in `load`.
        """
        old = active.run
        memory = {average.rule.name: average for average in old.averages}
        with self.resources.unlocked():  # the run's own jobs wait for the end of the rewind
            run = load_run(generation, memory, self.resources.device)
        run.every, run.config, run.files = old.every, old.config, old.files
        run.set_step_units(old.step_units)
        active.run, active.saved, active.generation = run, run.mark, generation
        active.begun_at, active.begun_step = self.resources.clock(), generation.step
        active.rate.reset()

    def settle(self, name: str) -> None:
        """Free the run's memory if its session is over and nothing is left to publish."""
        active = None if name in self.joining else self._by_name.get(name)
        if active is not None and active.is_idle and active.departed and not active.is_changed:
            self.forget(active)

    def forget(self, active: ActiveRun) -> None:
        """Free the run's memory and show what is left: a run without a snapshot or an end leaves nothing."""
        self._by_name.pop(active.name, None)
        status = replace(active.status(), memory_bytes=0, publish_every_seconds=None, publish_every_steps=None)
        if active.failure is not None:
            self.resources.statuses.set(replace(status, step=status.published_step))
        elif active.run.last_step is None and active.state is not RunState.FINISHED:
            self.resources.statuses.remove(active.name)
        else:
            self.resources.statuses.set(status)

    def drop(self, active: ActiveRun) -> None:
        """Free the run's memory and show what the disk holds."""
        self._by_name.pop(active.name, None)
        self.show_from_disk(active.name)

    def fail(self, active: ActiveRun, text: str) -> None:
        """Quarantine a run after an internal error, and free its memory once the publisher is done with it."""
        active.state = RunState.WAITING
        active.quarantine = Quarantine(active.run.last_step or 0, (), text, self.resources.now())
        try:
            active.fail(text)
            active.show()
            self.settle(active.name)
        except Exception:
            logger.exception("run %s: what is left of it after an internal error is dropped", active.name)
            self._by_name.pop(active.name, None)

    def drop_spares(self) -> bool:
        """Free memory that only makes passes faster; returns whether there was any."""
        holders = [active for active in self.all() if active.run.drop_spares()]
        return bool(holders)

    def kept(self, name: str) -> tuple[Generation, ...]:
        """The generations of a run that retention keeps, newest first. The publisher may delete others at any time."""
        generations = self.resources.catalog.generations(name)
        gone = expired(generations, self.resources.config.keep_generations)
        return tuple(generation for generation in generations if generation not in gone)

    def readable(self, name: str) -> Iterator[tuple[Generation, GenerationRecord, Manifest]]:
        """The generations of a run whose records can be read, newest first. Broken ones are set aside.

        Raises:
            OSError: the disk fails.
        """
        for generation in self.resources.catalog.generations(name):
            try:
                record = read_record(generation.folder)
                yield generation, record, read_manifest(generation.folder, record)
            except BrokenGeneration as error:
                self.resources.publisher.set_bad(generation, error)

    def show_from_disk(self, name: str) -> None:
        """Put the status of a run that is not in memory into the status store."""
        for generation, record, manifest in self.readable(name):
            try:
                self.resources.statuses.set(status_on_disk(generation, record, manifest))
            except ValueError as error:
                self.resources.publisher.set_bad(generation, BrokenGeneration(str(error)))
            else:
                return

    def restore(self) -> None:
        """List every generation on disk in the catalog, and every run in the status store.

        Raises:
            OSError: the data folder cannot be read.
        """
        data_dir = self.resources.data_dir
        for name in data_dir.runs():
            for generation in data_dir.whole_generations(name):
                self.resources.catalog.add(generation)
            self.show_from_disk(name)

    def _add(self, run: Run, generation: Generation | None) -> ActiveRun:
        next_seq = self.resources.data_dir.next_seq(run.name)
        begun_at, begun_step = self.resources.clock(), run.ledger.origin if generation is None else generation.step
        active = ActiveRun(self.resources, run, next_seq, generation, run.mark, begun_at, begun_step)
        self._by_name[run.name] = active
        return active

    def _is_blocked(self, name: str) -> bool:
        """Whether a JOIN or a rewind is in progress, or the publisher still works for a run that has failed."""
        active = self._by_name.get(name)
        if name in self.joining:
            return True
        return active is not None and (active.rewind is not None or active.failure is not None)
