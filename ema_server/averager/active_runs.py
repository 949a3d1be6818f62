"""The runs in memory, and what the status store shows of all runs. The averager's thread alone uses it.

Comes in: names and courses. Goes out: courses, and statuses on the status store. Broken generations met are set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ema_proto.wire.manifest import Manifest
from ema_server.averager.active_run import ActiveRun
from ema_server.averager.status import status_in_memory, status_on_disk
from ema_server.publishing.publisher import Publisher
from ema_server.runs.rate import Rate
from ema_server.runs.status_store import RunState, StatusStore
from ema_server.storage.catalog import Catalog, Generation
from ema_server.storage.generation import read_manifest, read_record
from ema_server.storage.records import BrokenGeneration, GenerationRecord


@dataclass(slots=True)
class ActiveRuns:
    """The active runs by the run's name."""

    catalog: Catalog
    statuses: StatusStore
    publisher: Publisher
    clock: Callable[[], float]
    _by_name: dict[str, ActiveRun] = field(default_factory=dict)

    def get(self, name: str) -> ActiveRun | None:
        """The course of a run that is in memory, or coming there."""
        return self._by_name.get(name)

    def all(self) -> tuple[ActiveRun, ...]:
        """Every course."""
        return tuple(self._by_name.values())

    def open(self, name: str) -> ActiveRun:
        """The course of a run, made if there is none.

        Raises:
            OSError: its folder cannot be made or read.
        """
        known = self._by_name.get(name)
        if known is not None:
            return known
        self.publisher.data_dir.create_run(name)
        course = ActiveRun(name, self.publisher.data_dir.next_seq(name), self.clock(), Rate())
        course.generation = next(iter(self.catalog.generations(name)), None)
        self._by_name[name] = course
        return course

    def show(self, course: ActiveRun) -> None:
        """Put the run's status on the status store."""
        if course.run is not None:
            self.statuses.set(status_in_memory(course, course.run))

    def settle(self, course: ActiveRun) -> None:
        """Free the run's memory if its trainer has left and all of it is durable, or if it never came to be."""
        if not course.is_quiet or course.held or course.barrier:
            return
        if course.run is None or (course.departed and not course.is_changed):
            self.forget(course)

    def forget(self, course: ActiveRun) -> None:
        """Free the run's memory and show what is left of it: a run without a snapshot or an end leaves nothing."""
        self._by_name.pop(course.name, None)
        run, course.run = course.run, None
        if run is None:
            return
        if run.last_step is None and course.state is not RunState.FINISHED:
            self.statuses.remove(course.name)
        else:
            self.statuses.set(replace(status_in_memory(course, run), memory_bytes=0))

    def readable(self, name: str) -> Iterator[tuple[Generation, GenerationRecord, Manifest]]:
        """The generations of a run whose records can be read, newest first.

        Raises:
            OSError: the disk fails.
        """
        for generation in self.catalog.generations(name):
            try:
                record = read_record(generation.folder)
                yield generation, record, read_manifest(generation.folder, record)
            except BrokenGeneration as error:
                self.publisher.set_bad(generation, error)

    def show_from_disk(self, name: str) -> None:
        """Put the status of a run that is not in memory on the status store."""
        for generation, record, manifest in self.readable(name):
            try:
                self.statuses.set(status_on_disk(generation, record, manifest))
            except ValueError as error:
                self.publisher.set_bad(generation, BrokenGeneration(str(error)))
            else:
                return

    def restore(self) -> None:
        """Find every generation on the disk, for the catalog and the status store."""
        for name in self.publisher.data_dir.runs():
            for generation in self.publisher.data_dir.whole_generations(name):
                self.catalog.add(generation)
            self.show_from_disk(name)
