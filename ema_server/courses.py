"""The runs in memory, and what the board shows of all runs. The averager's thread alone uses it.

Comes in: names and courses. Goes out: courses, and statuses on the board. Broken generations met are set aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ema_proto.manifest import Manifest
from ema_server.board import Board, RunState
from ema_server.catalog import Catalog, Generation
from ema_server.course import Course
from ema_server.generation import read_manifest, read_record
from ema_server.publisher import Publisher
from ema_server.rate import Rate
from ema_server.records import BrokenGeneration, GenerationRecord
from ema_server.status import status_in_memory, status_on_disk


@dataclass(slots=True)
class Courses:
    """Courses by the run's name."""

    catalog: Catalog
    board: Board
    publisher: Publisher
    clock: Callable[[], float]
    _by_name: dict[str, Course] = field(default_factory=dict)

    def get(self, name: str) -> Course | None:
        """The course of a run that is in memory, or coming there."""
        return self._by_name.get(name)

    def all(self) -> tuple[Course, ...]:
        """Every course."""
        return tuple(self._by_name.values())

    def open(self, name: str) -> Course:
        """The course of a run, made if there is none.

        Raises:
            OSError: its folder cannot be made or read.
        """
        known = self._by_name.get(name)
        if known is not None:
            return known
        self.publisher.data_dir.create_run(name)
        course = Course(name, self.publisher.data_dir.next_seq(name), self.clock(), Rate())
        course.generation = next(iter(self.catalog.generations(name)), None)
        self._by_name[name] = course
        return course

    def show(self, course: Course) -> None:
        """Put the run's status on the board."""
        if course.run is not None:
            self.board.put(status_in_memory(course, course.run))

    def settle(self, course: Course) -> None:
        """Free the run's memory if its trainer has left and all of it is durable, or if it never came to be."""
        if not course.is_quiet or course.held or course.barrier:
            return
        if course.run is None or (course.departed and not course.is_changed):
            self.forget(course)

    def forget(self, course: Course) -> None:
        """Free the run's memory and show what is left of it: a run without a snapshot or an end leaves nothing."""
        self._by_name.pop(course.name, None)
        run, course.run = course.run, None
        if run is None:
            return
        if run.last_step is None and course.state is not RunState.FINISHED:
            self.board.drop(course.name)
        else:
            self.board.put(replace(status_in_memory(course, run), memory_bytes=0))

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
        """Put the status of a run that is not in memory on the board."""
        for generation, record, manifest in self.readable(name):
            try:
                self.board.put(status_on_disk(generation, record, manifest))
            except ValueError as error:
                self.publisher.set_bad(generation, BrokenGeneration(str(error)))
            else:
                return

    def restore(self) -> None:
        """Find every generation on the disk, for the catalog and the board."""
        for name in self.publisher.data_dir.runs():
            for generation in self.publisher.data_dir.whole_generations(name):
                self.catalog.add(generation)
            self.show_from_disk(name)
