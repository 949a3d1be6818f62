"""The ring of a run: a bounded number of snapshots of its power-function averages, to synthesize others from later.

    runs/{run}/ring/{seq}-{step}/    snapshot.json  config.json  {average}.safetensors...

Snapshots are hard links, which cost only what no generation holds. Only the publisher's thread writes, any
thread may read. If the disk fails, the ring stops growing, and averaging continues.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ema_server.config import RingDtype
from ema_server.publishing.retention import thinned
from ema_server.publishing.ring_snapshot import RingSnapshot, powers_of, read_snapshot, write_snapshot
from ema_server.storage.catalog import Generation, content_nbytes
from ema_server.storage.datadir import TEMPORARY, DataDir, delete_whole
from ema_server.storage.disk import make_folder, replace_durably, shortage, sync_folders
from ema_server.storage.generation import is_folder_name, step_in
from ema_server.storage.records import BrokenGeneration
from ema_server.tensors.safetensors_file import BadModelFile

logger = logging.getLogger("ema")

_CUT_FILE = "ring.cut"  # not in the ring's own folder, which may be what the disk refuses
_GENERATIONS_TO_COME = 2  # one may be written while another is deleted
_EXPECTED_S = 60.0  # a snapshot of links takes milliseconds, one in bfloat16 as long as its bytes


class _NoRoom(Exception):
    """A snapshot would take the room that generations need."""


@dataclass(frozen=True, slots=True)
class RingStatus:
    """How many snapshots a run's ring has, and their steps; `error` says why it does not grow, None if it does."""

    snapshots: int
    first_step: int | None
    last_step: int | None
    error: str | None


_NOTHING = RingStatus(0, None, None, None)


class Ring:
    """The rings of all runs.

    Args:
        data_dir: the data folder.
        size: how many snapshots a ring has at most; 0 keeps none.
        every_steps: the least number of steps between two snapshots; the last of a run is always kept.
        dtype: of averaged tensors in the snapshots.
    """

    def __init__(self, data_dir: DataDir, size: int, every_steps: int = 0, dtype: RingDtype = "float32") -> None:
        self._data_dir = data_dir
        self._size = size
        self._every_steps = every_steps
        self._dtype: RingDtype = dtype
        self._lock = threading.Condition()
        self._expected: Counter[str] = Counter()
        self._statuses: dict[str, RingStatus] = {}
        self._offered: dict[str, int] = {}
        self._readers: dict[str, int] = {}
        self._on_cut: list[Callable[[str, int], None]] = []
        self._cuts: dict[str, int] = {}  # beyond which step snapshots are still to be dropped

    def restore(self) -> None:
        """Read what is on the disk, before the publisher starts.

        Raises:
            OSError: the data folder cannot be read.
        """
        for run in self._data_dir.runs():
            try:
                self._read_cut(run)
                self._cut_now(run)
                self._show(run)
            except OSError as error:
                self._fail(run, f"it could not be read: {_reason(error)}")
            self._offer_again(run)

    def listen(self, on_cut: Callable[[str, int], None]) -> None:
        """Call `on_cut(run, step)`, on the publisher's thread, whenever a run continues from an earlier step."""
        self._on_cut.append(on_cut)

    @property
    def every_steps(self) -> int | None:
        """The number of steps after which a snapshot is due; None if every generation makes one, or none does."""
        return self._every_steps if self._size and self._every_steps else None

    def due_at(self, run: str, begun_step: int) -> int | None:
        """The step at which a run with power averages is due for a snapshot; None if every generation makes one.

        Args:
            run: its name.
            begun_step: counts as the step of the last snapshot if there has been none.
        """
        if self.every_steps is None:
            return None
        return self._offered.get(run, begun_step) + self._every_steps

    def expect(self, run: str) -> None:
        """A generation of `run` will be offered to `keep`: until it has `arrived`, readers of the ring wait."""
        with self._lock:
            self._expected[run] += 1

    def arrived(self, run: str) -> None:
        """The generation that was expected has been offered."""
        with self._lock:
            self._expected -= Counter((run,))  # which leaves no zeros
            self._lock.notify_all()

    def keep(self, generation: Generation) -> None:
        """Add the power averages of a generation to the ring if a snapshot is due, and thin it out (publisher only).

        A step that the ring has is not added again.
        """
        run, due_at = generation.run, self.due_at(generation.run, -self._every_steps)
        is_early = due_at is not None and generation.step < due_at and not generation.finished
        if not self._size or is_early or not powers_of(generation):
            return
        self._offered[run] = generation.step
        try:
            self._cut_now(run)
            self._check_room(generation)
            self._add(generation)
            self._thin_out(run)
        except (OSError, BrokenGeneration, BadModelFile, _NoRoom) as error:
            if not os.path.lexists(generation.folder):
                return  # its run was set aside meanwhile: it will be offered under the new name
            self._fail(run, f"step {generation.step} could not be kept: {_reason(error)}")
        else:
            self._show(run)

    def cut(self, run: str, step: int) -> None:
        """Discard snapshots after `step`: the run was rewound and diverges from here (publisher only).

        What cannot be deleted now is deleted before the next snapshot is added, even after a restart, so that the two
        histories are never mixed.
        """
        self._cuts[run] = min(step, self._cuts.get(run, step))
        for listener in self._on_cut:
            listener(run, step)
        try:
            self._cut_now(run)
            self._show(run)
            self._offer_again(run)
        except OSError as error:
            self._fail(run, f"the snapshots after step {step} could not be deleted: {_reason(error)}")
            self._write_cut(run)

    def settle(self, run: str) -> None:
        """Wait for a snapshot that is about to be added."""
        with self._lock:
            self._lock.wait_for(lambda: self._expected[run] <= 0, _EXPECTED_S)

    def snapshots(self, run: str) -> tuple[RingSnapshot, ...]:
        """The snapshots in the ring of a run, by step, including one that is about to be added.

        Raises:
            OSError: the disk fails, or a snapshot has just been deleted.
            BrokenGeneration: a snapshot cannot be read.
        """
        self.settle(run)
        found = [read_snapshot(path) for path in self._folders(run)]
        return tuple(sorted(found, key=lambda snapshot: snapshot.step))

    def status(self, run: str) -> RingStatus | None:
        """The status of a run's ring; None if it has none."""
        with self._lock:
            return self._statuses.get(run)

    def rename(self, run: str, new_run: str) -> None:
        """The run and its folder have another name."""
        with self._lock:
            self._offered.pop(run, None)
            if run in self._cuts:
                self._cuts[new_run] = self._cuts.pop(run)
            moved = self._statuses.pop(run, None)
            if moved is not None:
                self._statuses[new_run] = moved

    def forget(self, run: str) -> None:
        """The run was deleted."""
        with self._lock:
            self._offered.pop(run, None)
            self._cuts.pop(run, None)
            self._statuses.pop(run, None)

    @contextmanager
    def reading(self, run: str) -> Iterator[None]:
        """Inside the block the ring is not thinned out, and may grow beyond its size."""
        with self._lock:
            self._readers[run] = self._readers.get(run, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[run] -= 1
                if not self._readers[run]:
                    del self._readers[run]

    def _check_room(self, generation: Generation) -> None:
        """A link costs nothing now, but keeps old files from making room for new generations: those come first."""
        nbytes = content_nbytes(entry for version in generation.versions for entry in version.files)
        short = shortage(generation.folder, _GENERATIONS_TO_COME * nbytes)
        if short is not None:
            raise _NoRoom(f"{short} for the next generations")

    def _add(self, generation: Generation) -> None:
        parent = self._data_dir.ring_folder(generation.run)
        folder = parent / generation.folder.name
        if any(step_in(path.name) == generation.step for path in self._folders(generation.run)):
            return
        make_folder(parent)  # in the run's own folder, which is gone if the run was deleted meanwhile
        temporary = parent / (TEMPORARY + folder.name)
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was set aside meanwhile
        try:
            write_snapshot(temporary, generation, self._dtype)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # renamed, where all went well
        sync_folders([parent])

    def _thin_out(self, run: str) -> None:
        with self._lock:
            if self._readers.get(run):
                return
        by_step = {step_in(path.name): path for path in self._folders(run)}
        for step in thinned(sorted(by_step), self._size):
            delete_whole(by_step[step])

    def _cut_now(self, run: str) -> None:
        if run not in self._cuts:
            return
        later = [path for path in self._folders(run) if step_in(path.name) > self._cuts[run]]
        for path in later:
            delete_whole(path)
        if later:
            sync_folders([self._data_dir.ring_folder(run)])
        note = self._cut_file(run)
        if note.exists():
            note.unlink()
            sync_folders([note.parent])
        del self._cuts[run]

    def _write_cut(self, run: str) -> None:
        """Record on the disk a cut that could not be made, for the next process."""
        try:
            replace_durably(self._cut_file(run), b"%d\n" % self._cuts[run])
        except OSError as error:
            logger.error("run %s: a restart would forget to cut its ring: %s", run, _reason(error))

    def _read_cut(self, run: str) -> None:
        try:
            self._cuts[run] = int(self._cut_file(run).read_bytes())
        except FileNotFoundError:
            return
        except ValueError:
            self._cuts[run] = -1  # which history the snapshots belong to is not known
            logger.error("run %s: %s cannot be read: its ring starts over", run, self._cut_file(run))

    def _cut_file(self, run: str) -> Path:
        return self._data_dir.run_folder(run) / _CUT_FILE

    def _offer_again(self, run: str) -> None:
        """Count the cadence from the newest snapshot."""
        status = self.status(run)
        if status is None or status.last_step is None:
            self._offered.pop(run, None)
        else:
            self._offered[run] = status.last_step

    def _folders(self, run: str) -> list[Path]:
        folder = self._data_dir.ring_folder(run)
        return [path for path in folder.iterdir() if is_folder_name(path.name)] if folder.is_dir() else []

    def _fail(self, run: str, error: str) -> None:
        """Record an error without reading the disk, which has just failed."""
        with self._lock:
            known = self._statuses.get(run, _NOTHING)
            self._statuses[run] = replace(known, error=error)
        if known.error is None:
            logger.error(
                "run %s: its ring for later synthesis stores no more snapshots, averaging continues: %s", run, error
            )

    def _show(self, run: str) -> None:
        steps = [step_in(path.name) for path in self._folders(run)]
        with self._lock:
            known = self._statuses.pop(run, _NOTHING)
            if steps:
                self._statuses[run] = RingStatus(len(steps), min(steps), max(steps), None)
        if known.error is not None:
            logger.info("run %s: its ring for later synthesis stores snapshots again", run)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
