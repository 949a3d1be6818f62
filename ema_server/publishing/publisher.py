"""The publisher thread: makes generations durable, lists them in the catalog, and deletes those that have expired.

It takes orders, at most one generation at a time for each run, and reports each generation with a `PublishResult`.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ema_server.publishing.commit import Content, commit, commit_links
from ema_server.publishing.retention import expired
from ema_server.publishing.ring import Ring
from ema_server.publishing.writer import GenerationWriter
from ema_server.storage.catalog import Catalog, Generation, content_nbytes
from ema_server.storage.companions import CompanionStore
from ema_server.storage.datadir import DataDir
from ema_server.storage.disk import sync_folders
from ema_server.storage.records import BrokenGeneration, GenerationInfo, RunRecord
from ema_server.storage.usage import DiskUsage
from ema_server.telemetry import Telemetry

PRUNE_EVERY_S = 60.0  # a run that publishes no more is pruned once no reader holds its expired generations

_TICK_S = 1.0  # how late that may be

logger = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class PublishResult:
    """How an order ended: the generation, or why there is none. `broken`: the source to link cannot be used."""

    generation: Generation | None
    error: str = ""
    broken: bool = False


@dataclass(frozen=True, slots=True)
class CommitOrder:
    """Complete a draft that has been written."""

    run: str
    info: GenerationInfo
    draft: GenerationWriter
    content: Content


@dataclass(frozen=True, slots=True)
class LinkOrder:
    """Make the files of `source` the newest generation, recorded as `record`.

    `verified`: this process has written or checked the bytes of `source`, so that they need not be checked.
    """

    run: str
    info: GenerationInfo
    source: Generation
    record: RunRecord
    verified: bool


@dataclass(frozen=True, slots=True)
class CutRing:
    """The run continues from `step`: drop later snapshots from its ring."""

    run: str
    step: int


@dataclass(frozen=True, slots=True)
class OfferToRing:
    """Offer the run's newest generation to its ring; see `Publisher.offer`."""

    run: str


@dataclass(frozen=True, slots=True)
class EraseRun:
    """Erase a deleted run's files in its renamed folder.

    `keeps_folder`: leave the folder itself, by which the next start knows that something else of the run is left.
    """

    run: str
    folder: Path
    keeps_folder: bool


GenerationOrder: TypeAlias = CommitOrder | LinkOrder
Order: TypeAlias = GenerationOrder | CutRing | OfferToRing | EraseRun


class Publisher:
    """Owns the files of all generations once they are written.

    Args:
        data_dir: the data folder.
        catalog: lists what is durable.
        ring: keeps power averages besides.
        usage: measured after every change of a run's files.
        companions: trimmed after every generation that was written.
        telemetry: counts generations.
        keep: how many of the newest generations of a run stay, and how many older ones at most.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        data_dir: DataDir,
        catalog: Catalog,
        ring: Ring,
        usage: DiskUsage,
        companions: CompanionStore,
        telemetry: Telemetry,
        *,
        keep: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._data_dir = data_dir
        self._catalog = catalog
        self._ring = ring
        self._keep = keep
        self._telemetry = telemetry
        self._usage = usage
        self._companions = companions
        self._clock = clock
        self._prune_at = clock() + PRUNE_EVERY_S
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._on_done: Callable[[str, PublishResult], None] = lambda run, result: None
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)

    def start(self, on_done: Callable[[str, PublishResult], None]) -> None:
        """Start the thread, which first offers to each ring what a crash kept from it.

        Args:
            on_done: called on the publisher's thread with the run and the result of each generation order.
        """
        self._on_done = on_done
        for run in self._catalog.runs():
            self.offer(run)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, order: Order) -> None:
        """Queue an order. Any thread; never blocks."""
        self._orders.put(order)

    def offer(self, run: str) -> None:
        """Offer the run's newest generation to its ring again, after a crash or under a new name of the run."""
        self._ring.expect(run)
        self.submit(OfferToRing(run))

    def stop(self, timeout_s: float) -> bool:
        """Finish what is queued; returns whether that was done in time."""
        self._orders.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def set_bad(self, generation: Generation, error: BrokenGeneration) -> None:
        """Remove a broken generation from the catalog and rename its folder. Any thread."""
        self._catalog.remove(generation, force=True)
        try:
            self._data_dir.set_bad(generation.folder, error)
        except OSError as problem:
            logger.error("%s could not be set aside: %s", generation.folder, problem)

    def _work(self) -> None:
        while True:
            try:
                order = self._orders.get(timeout=_TICK_S)
            except queue.Empty:
                pass
            else:
                if order is None:
                    return
                with self._contained(order.run, type(order).__name__):
                    self._execute(order)
                    self._usage.measure(order.run)
            self._prune_if_due()

    @contextmanager
    def _contained(self, run: str, what: str) -> Iterator[None]:
        """Confine an unexpected error to one run and one order: the thread continues."""
        try:
            yield
        except Exception:
            self._telemetry.internal_errors.inc()
            logger.exception("run %s: internal error of the publisher in %s", run, what)

    def _execute(self, order: Order) -> None:
        match order:
            case CutRing():
                self._ring.cut(order.run, order.step)
            case OfferToRing():
                self._offer_newest(order.run)
            case EraseRun():
                _erase(order)
            case CommitOrder() | LinkOrder():
                self._publish(order)

    def _publish(self, order: GenerationOrder) -> None:
        """Make a generation durable and report it; then delete files and fill the ring, which no answer waits for."""
        started = time.perf_counter()
        result = self._make(order)
        self._telemetry.generation_seconds.inc(time.perf_counter() - started)
        generation = result.generation
        if generation is None:
            self._telemetry.generation_failures.inc()
            self._on_done(order.run, result)
            return
        self._telemetry.generations.inc()
        files = (file for version in generation.versions for file in version.files)
        self._telemetry.generation_bytes.inc(content_nbytes(files))
        self._catalog.add(generation)
        expired_folders = self._set_expired_aside(order.run)
        if isinstance(order, CommitOrder):  # now, while no later generation of the run is in progress
            self._companions.trim(order.run, order.content.companions)
        self._ring.expect(order.run)
        self._on_done(order.run, result)
        _delete(expired_folders)
        self._offer_newest(order.run, generation)

    def _make(self, order: GenerationOrder) -> PublishResult:
        run, info = order.run, order.info
        try:
            if isinstance(order, CommitOrder):
                return PublishResult(commit(order.draft, order.content, info))
            folder = self._temporary(order)
            return PublishResult(commit_links(order.source, folder, order.record, info, verified=order.verified))
        except BrokenGeneration as error:
            self._discard(order)
            if isinstance(order, LinkOrder):
                self.set_bad(order.source, error)
            return PublishResult(None, f"the generation is broken: {error}", broken=True)
        except OSError as error:
            logger.error("run %s: generation %d was not published: %s", run, info.seq, error)
            self._discard(order)
            return PublishResult(None, f"the generation could not be written: {error.strerror or error}")
        except Exception as error:
            self._telemetry.internal_errors.inc()
            logger.exception("run %s: generation %d was not published: internal error", run, info.seq)
            self._discard(order)
            return PublishResult(None, f"the generation could not be written: internal error: {error!r}")

    def _offer_newest(self, run: str, generation: Generation | None = None) -> None:
        try:
            newest = generation or next(iter(self._catalog.generations(run)), None)
            if newest is not None:
                self._ring.keep(newest)
        finally:
            self._ring.arrived(run)

    def _discard(self, order: GenerationOrder) -> None:
        if isinstance(order, CommitOrder):
            order.draft.discard()
        else:
            shutil.rmtree(self._temporary(order), ignore_errors=True)

    def _temporary(self, order: GenerationOrder) -> Path:
        return self._data_dir.temporary(order.run, f"{order.info.seq:08d}")

    def _prune_if_due(self) -> None:
        """Delete the expired generations of every run that were held when the run last published."""
        now = self._clock()
        if now < self._prune_at:
            return
        self._prune_at = now + PRUNE_EVERY_S
        for run in self._catalog.runs():
            with self._contained(run, "pruning"):
                folders = self._set_expired_aside(run)
                if folders:
                    _delete(folders)
                    self._usage.measure(run)

    def _set_expired_aside(self, run: str) -> list[Path]:
        """Rename expired generations, so that a crash while deleting leaves no partial one under its own name."""
        folders = []
        for generation in expired(self._catalog.generations(run), self._keep):
            if not self._catalog.remove(generation):
                continue
            aside = self._data_dir.temporary(run, f"old-{generation.folder.name}")
            try:
                folders.append(generation.folder.rename(aside))
            except FileNotFoundError:
                continue  # its run has another name, or was deleted, since the catalog was read
            except OSError as error:
                logger.warning("%s could not be deleted: %s", generation.folder, error)
        return folders


def _delete(folders: list[Path]) -> None:
    """Delete folders that were set aside; what the disk does not delete is swept at the next start.

    Their new names are made durable first: a power loss could leave an old name and not all files.
    """
    try:
        sync_folders({folder.parent for folder in folders})
    except OSError as error:  # also if the run was set aside meanwhile
        logger.warning("expired generations are deleted at the next start: %s", error)
        return
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _erase(order: EraseRun) -> None:
    """Erase what the disk allows; the rest is erased at the next start."""
    for path in order.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    if not order.keeps_folder:
        try:
            order.folder.rmdir()
        except OSError as error:
            logger.warning("%s, a deleted run, is erased at the next start: %s", order.folder, error)
