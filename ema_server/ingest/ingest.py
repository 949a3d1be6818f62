"""The ingest thread: it owns the socket, the receiver machine and the slots.

Frames become jobs for the averager, whose answers come back through an inbox. Each chunk is received straight into its
slot and checked for NaN and Inf while it is in cache; the averager checks a snapshot in shared memory.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from ema_proto.auth import NONCE_BYTES
from ema_proto.errors import RejectCode
from ema_proto.limits import SLOTS
from ema_proto.receiver import events as e
from ema_proto.receiver import machine
from ema_proto.wire.messages import SHM, ZMQ
from ema_server.averager import jobs
from ema_server.averager.averager import Averager
from ema_server.compute.memory import allocate
from ema_server.config import ServerConfig
from ema_server.ingest.companion_files import FileWriter, entry_of_spec
from ema_server.ingest.link import RouterLink
from ema_server.ingest.local_socket import LocalSocket, SharedSlots
from ema_server.ingest.peers import Peers
from ema_server.ingest.staging import Staging
from ema_server.runs.lanes import LaneStore
from ema_server.runs.ranks import LastDropped, RanksStore, ranks_text
from ema_server.storage.companions import CompanionStore
from ema_server.storage.records import rfc3339
from ema_server.telemetry import Telemetry

logger = logging.getLogger("ema")

_Event = TypeVar("_Event")
_Answer = TypeVar("_Answer")

_TICK_S = 0.25
_BURST = 64  # messages between two looks at the averager's answers


class Ingest:
    """Receives the snapshots of all runs, and passes them on to `averager` as jobs."""

    def __init__(
        self,
        config: ServerConfig,
        averager: Averager,
        companions: CompanionStore,
        telemetry: Telemetry,
        ranks: RanksStore,
        lanes: LaneStore,
    ) -> None:
        self._config = config
        self._averager = averager
        self._telemetry = telemetry
        self._ranks = ranks
        self._lanes = lanes
        self._link = RouterLink()
        self._local = LocalSocket(() if config.shm_uids is None else tuple(map(int, config.shm_uids.split(","))))
        self._look_at = 0.0  # when to look at the local socket again
        self._copies = ThreadPoolExecutor(1, "parts", partial(torch.set_num_threads, 1))  # one: they keep their order
        self._peers = Peers(self._link.happenings)
        self._files = FileWriter(companions, lambda part, problem: self._post(lambda: self._take_file(part, problem)))
        self._receiver = self._new_receiver(None)
        self._staging: dict[int, Staging] = {}  # by ticket
        self._buffer = allocate(config.chunk_bytes)
        self._joins = ThreadPoolExecutor(1, "joins")
        self._inbox: deque[Callable[[], None]] = deque()
        self._greeted = 0  # how much of the receiver's count is in the telemetry
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)

    def start(self) -> str:
        """Listen and start receiving; returns the endpoint with the actual port.

        Raises:
            OSError: the address is in use, or not one of this machine.
        """
        endpoint = self._link.bind(self._config.zmq)
        self._peers.start()
        self._receiver = self._new_receiver(self._local.listen(self._config.shm_folder))
        self._thread.start()
        return endpoint

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> None:
        """Stop receiving. Incomplete snapshots are discarded."""
        self._stopping = True
        self._link.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        elif self._thread.ident is None:  # never started: the thread closes the link when it ends
            self._link.close()
        self._files.stop()
        self._copies.shutdown(cancel_futures=True)

    def published(self, run: str, step: int) -> None:
        """Tell the run's trainer that a generation is durable. Any thread may call it."""
        self._post(lambda: self._receiver.published(run, step))

    def _post(self, answer: Callable[[], None]) -> None:
        self._inbox.append(answer)
        if threading.get_ident() != self._thread.ident:  # this thread looks at the inbox before it waits
            self._link.wake()

    def _new_receiver(self, shm: str | None) -> machine.Receiver:
        return machine.Receiver(
            epoch=secrets.randbits(63) | 1,
            token=self._config.token,
            nonce=lambda: secrets.token_hex(NONCE_BYTES),
            chunk_bytes=self._config.chunk_bytes,
            lost_after_s=self._config.lost_after_seconds,
            shm=shm,
        )

    def _run(self) -> None:
        # One thread sums a chunk in cache as fast as two (53 and 51 us for 4 MiB), and torch's threads wait for each
        # other if the cores are busy. The setting applies to this thread only.
        torch.set_num_threads(1)
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._link.close()
            self._local.close()
            self._joins.shutdown(cancel_futures=True)

    def _turn(self) -> None:
        self._telemetry.beat("ingest")
        self._link.wait(0.0 if self._receiver.has_work else _TICK_S)
        now = time.monotonic()
        for _ in range(_BURST):
            if not self._take_message(now):
                break
        while self._inbox:
            self._inbox.popleft()()
            self._forward()
        while (unread := self._receiver.take_join()) is not None:
            self._joins.submit(self._read_join, unread)
        self._receiver.tick(now)
        self._forward()
        if now >= self._look_at:
            self._local.receive(now)
            self._look_at = now + _TICK_S

    def _read_join(self, unread: machine.UnreadJoin) -> None:
        """Read a large JOIN on another thread, while this one receives from other trainers."""
        message = unread.read()
        self._post(lambda: self._receiver.join_read(unread, message))

    def _take_message(self, now: float) -> bool:
        message = self._link.next_header()
        if message is None:
            return False
        match self._receiver.header(*message, now):
            case e.Payload() as target:
                self._take_payload(target)
            case e.FileBody(length):
                self._receiver.file_payload(self._link.read(length))
            case e.Control(length):
                self._receiver.control(self._link.read(length))
            case e.Discard():
                self._link.drop()
        self._peers.heard(self._link.source, is_greeted=self._receiver.is_greeted(message[0]))
        self._forward()
        return True

    def _take_payload(self, target: e.Payload) -> None:
        staging = self._staging[target.ticket]
        place = staging.place(target)
        if not self._link.read_into(place.view):
            self._receiver.payload(None)
            return
        staging.received(target, place)
        self._receiver.payload(place.view)
        self._telemetry.chunks.inc()
        self._telemetry.ingest_bytes.inc(target.length)

    def _forward(self) -> None:
        """Send the machine's replies and handle its events."""
        while self._receiver.outbox:
            peer, frames = self._receiver.outbox.popleft()
            self._link.send(peer, frames)
        while self._receiver.events:
            self._take_event(self._receiver.events.popleft())
        for code, count in self._receiver.rejects.items():
            self._telemetry.rejects.labels(code.value).inc(count)
        self._receiver.rejects.clear()
        if self._receiver.greeted > self._greeted:
            self._telemetry.connections.inc(self._receiver.greeted - self._greeted)
            self._greeted = self._receiver.greeted

    def _take_event(self, event: e.ReceiverEvent) -> None:
        match event:
            case e.JoinRequested():
                self._take_join(event)
            case e.FileReceived():
                self._files.put(event)
                self._telemetry.ingest_bytes.inc(event.file.nbytes if event.offset == 0 else 0)
            case e.PartReady():
                self._copies.submit(self._copy, event, self._staging[event.ticket])
            case e.SnapshotReady():
                self._submit_apply(event)
            case e.StepDropped(run, _, step, rank, kind, why):
                logger.debug("run %s: step %d is dropped: %s", run, step, why)
                self._ranks.dropped(run, LastDropped(step, rank, kind, why, rfc3339(time.time())))
            case e.RanksMissing(run, _, missing):
                self._log_missing(run, self._ranks.set_missing(run, missing), missing)
            case e.PublishRequested():
                reason: jobs.Reason = "checkpoint" if event.pin else "request"
                self._averager.submit(jobs.Publish(event.run, reason, self._reply(self._take_published, event)))
            case e.RewindRequested():
                self._averager.submit(jobs.Rewind(event.run, event.step, self._reply(self._take_rewound, event)))
            case e.FinishRequested():
                self._averager.submit(jobs.Finish(event.run, self._reply(self._take_finished, event)))
            case e.SessionEnded(run, ticket, lost):
                logger.info("run %s: the trainer %s", run, "is lost" if lost else "has left")
                self._staging.pop(ticket, None)
                self._ranks.left(run)
                self._lanes.left(run)
                self._files.drop(run)
                self._averager.submit(jobs.Leave(run, lost))

    def _reply(self, take: Callable[[_Event, _Answer], None], event: _Event) -> Callable[[_Answer], None]:
        """A job's reply: this thread calls `take(event, answer)`."""
        return lambda answer: self._post(lambda: take(event, answer))

    def _take_join(self, event: e.JoinRequested) -> None:
        self._telemetry.joins.inc()
        self._local.receive(time.monotonic())  # the trainer passes its slots before it asks to join
        shared = {}
        for rank, (part, session) in enumerate(zip(event.parts, event.sessions, strict=True)):
            slots = self._local.slots_of(session)
            if slots is not None and slots.nbytes >= part.nbytes > 0:
                shared[rank] = slots
        reply = self._reply(partial(self._take_joined, shared=shared), event)
        self._averager.submit(jobs.Join(event.run, event.join, reply))

    def _take_joined(
        self, event: e.JoinRequested, outcome: jobs.Joined | jobs.Refused, *, shared: Mapping[int, SharedSlots]
    ) -> None:
        if isinstance(outcome, jobs.Refused):
            logger.warning("run %s: refused: %s", event.run, outcome.text)
            self._receiver.refuse_join(event.run, event.ticket, outcome.code, outcome.text)
            return
        try:
            staging = Staging(event.run, outcome.manifest, event.parts, outcome.exempt, SLOTS, self._buffer, shared)
        except MemoryError as error:
            text = f"the server cannot allocate {SLOTS} slots of {outcome.manifest.nbytes} bytes: {error}"
            self._receiver.refuse_join(event.run, event.ticket, RejectCode.OUT_OF_MEMORY, text)
            self._averager.submit(jobs.Leave(event.run, lost=False))
            return
        accepted = self._receiver.accept_join(
            event.run,
            event.ticket,
            last_step=outcome.last_step,
            published_step=outcome.published_step,
            recent=outcome.recent,
            continuation=outcome.continuation,
            slots=SLOTS,
            set_aside=outcome.set_aside,
            missing_files=outcome.missing_files,
            shared={rank: len(slots.tensors) for rank, slots in shared.items()},
            reads_in_place=staging.reads_in_place,
        )
        if accepted:
            self._drop_staging(event.run)
            self._staging[event.ticket] = staging
            lane = SHM if all(rank in shared for rank, part in enumerate(event.parts) if part.nbytes) else ZMQ
            self._lanes.joined(event.run, lane)
            self._ranks.joined(event.run, len(event.parts), is_new=outcome.continuation == "new")
            place = "to" if outcome.continuation == "rewound" else "at"
            where = "" if outcome.last_step is None else f" {place} step {outcome.last_step}"
            logger.info("run %s: %s%s, lane %s", event.run, outcome.continuation, where, lane)
            if outcome.set_aside is not None:
                logger.info("run %s: the earlier run of this name is now %s", event.run, outcome.set_aside)
        self._gauge()

    def _take_file(self, part: e.FileReceived, problem: str | None) -> None:
        if problem is not None:
            self._receiver.failed(part.run, part.ticket, problem)
            return
        files = self._receiver.file_stored(part.run, part.ticket)
        if files is not None:
            logger.info("run %s: its companion files are stored (%d)", part.run, len(files))
            self._averager.submit(jobs.UseFiles(part.run, tuple(map(entry_of_spec, files))))

    def _copy(self, part: e.PartReady, staging: Staging) -> None:
        """Copy the part of a rank, on a thread of its own: other runs go on meanwhile."""
        try:
            staging.copy(part.rank, part.slot, part.source)
        except Exception as error:
            logger.exception("run %s: internal error while step %d was copied", part.run, part.begin.step)
            text = f"internal error: {error!r}"
            self._post(lambda: self._receiver.failed(part.run, part.ticket, text))
        else:
            self._post(lambda: self._receiver.copied(part))

    def _drop_staging(self, run: str) -> None:
        """Earlier sessions of the run are over, since only one streams."""
        for ticket in [ticket for ticket, staging in self._staging.items() if staging.run == run]:
            del self._staging[ticket]

    def _submit_apply(self, event: e.SnapshotReady) -> None:
        self._telemetry.snapshots.inc()
        staging, reply = self._staging[event.ticket], self._reply(self._take_applied, event)
        not_finite = None  # what was not received in chunks, the averager checks
        if event.source is not None:
            data = staging.shared[0].tensors[event.source][: staging.snapshot_nbytes]
            self._telemetry.ingest_bytes.inc(len(data))
        else:
            data = staging.slots[event.slot].tensor
            if not staging.shared:
                not_finite = staging.slots[event.slot].not_finite
        self._averager.submit(jobs.Apply(event.run, event.step, event.mode, data, not_finite, reply))

    def _take_applied(
        self, event: e.SnapshotReady, outcome: jobs.Applied | jobs.Quarantined | jobs.NotInMemory
    ) -> None:
        if isinstance(outcome, jobs.NotInMemory):
            self._receiver.failed(event.run, event.ticket, outcome.text)
            return
        if isinstance(outcome, jobs.Quarantined):
            self._receiver.quarantined(event.run, event.ticket, event.slot, outcome.text)
            return
        staging = self._staging.get(event.ticket)
        if staging is not None:
            staging.exempt(outcome.exempt)
        self._receiver.applied(event.run, event.ticket, event.slot)

    def _take_published(self, event: e.PublishRequested, outcome: jobs.Durable | jobs.Failed) -> None:
        step, error = _step_or_error(outcome)
        self._receiver.publish_answered(event.run, event.ticket, event.request, step, error, rank=event.rank)

    def _take_rewound(self, event: e.RewindRequested, outcome: jobs.Rewound | jobs.Failed) -> None:
        step, error = _step_or_error(outcome)
        recent = outcome.recent if isinstance(outcome, jobs.Rewound) else ()
        self._receiver.rewound(event.run, event.ticket, event.request, step, recent=recent, error=error)

    def _take_finished(self, event: e.FinishRequested, outcome: jobs.Durable | jobs.Failed) -> None:
        step, error = _step_or_error(outcome)
        warning = outcome.warning if isinstance(outcome, jobs.Durable) else None
        self._receiver.finished(event.run, event.ticket, event.request, step, error, warning)
        if error is None:
            self._staging.pop(event.ticket, None)
            self._ranks.left(event.run)
            self._lanes.left(event.run)
            self._gauge()

    def _log_missing(self, run: str, before: tuple[int, ...], missing: tuple[int, ...]) -> None:
        gone = sorted(set(missing).difference(before))
        back = sorted(set(before).difference(missing))
        if gone:
            logger.warning(
                "run %s: %s not heard from for some time: no step counts, and the averages stand still, until the "
                "trainer has all its ranks",
                run,
                f"{ranks_text(gone)} {'is' if len(gone) == 1 else 'are'}",
            )
        if back:
            logger.info("run %s: %s back", run, f"{ranks_text(back)} {'is' if len(back) == 1 else 'are'}")

    def _gauge(self) -> None:
        self._telemetry.sessions.set(len(self._staging))
        self._telemetry.slot_bytes.set(sum(staging.nbytes for staging in self._staging.values()))
        self._telemetry.shared_slot_bytes.set(sum(staging.shared_nbytes for staging in self._staging.values()))


def _step_or_error(outcome: jobs.Durable | jobs.Rewound | jobs.Failed) -> tuple[int | None, str | None]:
    return (None, outcome.text) if isinstance(outcome, jobs.Failed) else (outcome.step, None)
