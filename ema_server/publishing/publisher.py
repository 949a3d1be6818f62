"""The publisher thread: it makes generations durable, shows them in the catalog, and deletes those that have expired.

It takes orders, at most one at a time for each run, and passes one `PublishResult` for each to the order's callback.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ema_server.publishing.commit import Content, Label, link, seal
from ema_server.publishing.retention import expired
from ema_server.publishing.ring import Ring
from ema_server.publishing.writer import GenerationWriter
from ema_server.storage.catalog import Catalog, Generation
from ema_server.storage.datadir import DataDir
from ema_server.storage.records import BrokenGeneration, RunRecord, rfc3339
from ema_server.telemetry import Telemetry

logger = logging.getLogger("ema")


@dataclass(frozen=True, slots=True)
class PublishResult:
    """How an order ended: the generation, or why there is none. `broken`: the source to link was unusable."""

    generation: Generation | None
    error: str = ""
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Flight:
    """What every order has: the run, the number and the label of the generation to make."""

    run: str
    seq: int
    reason: str
    pinned: bool
    finished: bool


@dataclass(frozen=True, slots=True)
class SealOrder:
    """Complete a draft that has been written."""

    flight: Flight
    draft: GenerationWriter
    content: Content
    done: Callable[[PublishResult], None]


@dataclass(frozen=True, slots=True)
class LinkOrder:
    """Make `source` the newest generation; `amend` makes its record of what it was. No average begins with weights.

    `trusts`: this process has written or read the bytes of `source` itself, so that they need not be checked.
    """

    flight: Flight
    source: Generation
    amend: Callable[[RunRecord], RunRecord]
    trusts: bool
    done: Callable[[PublishResult], None]


@dataclass(frozen=True, slots=True)
class CutOrder:
    """The run goes on from `step`: what its ring holds of later ones is of a history left behind."""

    run: str
    step: int


@dataclass(frozen=True, slots=True)
class KeepOrder:
    """Offer the run's newest generation to its ring; see `Publisher.offer`."""

    run: str


Order: TypeAlias = SealOrder | LinkOrder | CutOrder | KeepOrder


class Publisher:
    """Owns the files of all generations once they are written.

    Args:
        data_dir: where they lie.
        catalog: where they are shown.
        keep_generations: how many of the newest ones of a run stay, and how many older ones at most.
        telemetry: where to count.
        ring: where power averages are kept besides.
        wall: seconds since the epoch, for `created`.
    """

    def __init__(
        self,
        data_dir: DataDir,
        catalog: Catalog,
        *,
        keep_generations: int,
        telemetry: Telemetry,
        ring: Ring,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.data_dir = data_dir
        self.catalog = catalog
        self.ring = ring
        self.wall = wall
        self._keep = keep_generations
        self._telemetry = telemetry
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Start the thread. What a crash kept from the rings is offered to them first."""
        for run in self.catalog.runs():
            self.offer(run)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, order: Order) -> None:
        """Queue an order. `done`, of one that has it, is called from the publisher's thread."""
        self._orders.put(order)

    def offer(self, run: str) -> None:
        """Offer the run's newest generation to its ring once more: a crash, or a new name, may have come in between."""
        self.ring.expect(run)
        self.submit(KeepOrder(run))

    def stop(self, timeout_s: float) -> bool:
        """Finish what is queued; returns whether that was done in time."""
        self._orders.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            match order:
                case CutOrder():
                    self.ring.cut(order.run, order.step)
                case KeepOrder():
                    self._offer(order.run)
                case SealOrder() | LinkOrder():
                    self._land(order)

    def _land(self, order: SealOrder | LinkOrder) -> None:
        """Carry out, answer, and do afterwards what nobody waits for."""
        started = time.perf_counter()
        landed = self._carry_out(order)
        self._telemetry.generation_seconds.inc(time.perf_counter() - started)
        self._count(landed)
        if landed.generation is None:
            order.done(landed)
            return
        self.catalog.add(landed.generation)
        expired_folders = list(self._set_expired_aside(landed.generation.run))
        self.ring.expect(landed.generation.run)
        order.done(landed)
        for folder in expired_folders:
            shutil.rmtree(folder, ignore_errors=True)  # what stays is swept at the next start
        self.ring.keep(landed.generation)
        self.ring.arrived(landed.generation.run)

    def _offer(self, run: str) -> None:
        for generation in self.catalog.generations(run)[:1]:
            self.ring.keep(generation)
        self.ring.arrived(run)

    def _carry_out(self, order: SealOrder | LinkOrder) -> PublishResult:
        flight = order.flight
        label = Label(flight.seq, flight.reason, flight.pinned, flight.finished, rfc3339(self.wall()))
        try:
            if isinstance(order, SealOrder):
                return PublishResult(seal(order.draft, order.content, label))
            return PublishResult(link(order.source, self._temporary(flight), label, order.amend, trusts=order.trusts))
        except BrokenGeneration as error:
            return self._give_up(order, error)
        except OSError as error:
            logger.error("run %s: generation %d was not published: %s", flight.run, flight.seq, error)
            self._discard(order)
            return PublishResult(None, f"the generation could not be written: {error.strerror or error}")

    def _give_up(self, order: SealOrder | LinkOrder, error: BrokenGeneration) -> PublishResult:
        self._discard(order)
        if isinstance(order, LinkOrder):
            self.set_bad(order.source, error)
        return PublishResult(None, f"the generation is broken: {error}", broken=True)

    def set_bad(self, generation: Generation, error: BrokenGeneration) -> None:
        """Take a broken generation out of the catalog and out of the way."""
        self.catalog.remove(generation, force=True)
        try:
            self.data_dir.set_bad(generation.folder, error)
        except OSError as problem:
            logger.error("%s could not be set aside: %s", generation.folder, problem)

    def _discard(self, order: SealOrder | LinkOrder) -> None:
        if isinstance(order, SealOrder):
            order.draft.discard()
        else:
            shutil.rmtree(self._temporary(order.flight), ignore_errors=True)

    def _temporary(self, flight: Flight) -> Path:
        return self.data_dir.temporary(flight.run, f"{flight.seq:08d}")

    def _set_expired_aside(self, run: str) -> Iterator[Path]:
        """Rename what has expired, so that a crash while deleting leaves nothing half under a generation's name."""
        for generation in expired(self.catalog.generations(run), self._keep):
            if not self.catalog.remove(generation):
                continue
            aside = self.data_dir.temporary(run, f"old-{generation.folder.name}")
            try:
                yield generation.folder.rename(aside)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", generation.folder, error)

    def _count(self, landed: PublishResult) -> None:
        if landed.generation is None:
            self._telemetry.generation_failures.inc()
            return
        self._telemetry.generations.inc()
        written = sum(entry.size for version in landed.generation.versions for entry in version.files)
        self._telemetry.generation_bytes.inc(written)
