"""A session with the server, as the training thread uses it: slots to fill, snapshots to send, requests with a timeout.

The connection has a thread of its own, the driver; this side reaches it through commands and `Shared` only.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Self

from ema_proto.errors import RejectCode
from ema_proto.limits import SLOTS
from ema_proto.sender.events import Answered, SenderState
from ema_proto.sender.machine import Sender
from ema_proto.wire import messages as m
from ema_proto.wire.parts import from_ranges, part_of
from trainer_client.connection.addresses import described, first_bytes, is_http
from trainer_client.connection.driver import Driver, Pending
from trainer_client.connection.link import Link
from trainer_client.connection.local_socket import LocalSocket, why_unreachable
from trainer_client.connection.shared_state import Shared, WorkerStats
from trainer_client.connection.transfers import TransferQueue
from trainer_client.counters import Counters
from trainer_client.errors import ConnectError, JoinError, RewindError
from trainer_client.settings import Lane
from trainer_client.staging import shared_memory
from trainer_client.staging.device import DeviceOf, device_of
from trainer_client.staging.slots import Pins, Slot, make_slots, present, reserve_slots
from trainer_client.staging.transfer import AsyncCopy

log = logging.getLogger("ema")

_RESTORE_S = 600.0  # a server that is alive may read averages of 100 GB back from its disk before it answers a JOIN


class Worker:
    """One session with the server.

    Args:
        endpoint: where the server listens for trainers.
        token: shared secret, or None.
        device_of: the device behind a torch device, None where copies cannot go on while training does.
        lane: how snapshots are sent: `shm` through shared memory, `zmq` through the socket, `auto` chooses.

    Attributes:
        counters: of this session; `torn` and `failed` are written where copies end, the rest by the training thread.
        device_of: as given.
        pins: the slots that are locked in memory.
        slots: all of them, once a run is joined and until the worker is closed.
    """

    def __init__(
        self, endpoint: str, *, token: str | None, device_of: DeviceOf = device_of, lane: Lane = Lane.AUTO
    ) -> None:
        self.counters = Counters()
        self.device_of = device_of
        self.pins = Pins()
        self.slots: tuple[Slot, ...] = ()
        self._endpoint = endpoint
        self._lane = lane
        self._may_share = lane is not Lane.ZMQ and shared_memory.is_available()
        self._copies = TransferQueue(self._send, self.give_back, self._say_skipped, self.counters)
        self._shared = Shared()
        self._publishing: Pending | None = None  # the last request of `publish_soon`
        self._link = Link(endpoint)
        session = secrets.token_bytes(16)
        self._sender = Sender(
            session,
            token=token,
            jitter=random.Random().random,  # not the seeded one of the training
            capabilities=(m.CRC32, m.FILES, m.SHM) if self._may_share else (m.CRC32, m.FILES),
        )
        self._driver = Driver(self._sender, self._link, LocalSocket(session), self._shared)
        self._driver.start()

    @classmethod
    def connect(
        cls,
        endpoint: str,
        token: str | None,
        timeout_s: float,
        device_of: DeviceOf = device_of,
        lane: Lane = Lane.AUTO,
    ) -> Self:
        """Connect, and wait until the server has accepted the connection.

        Raises:
            ConnectError: the server did not answer in time, or refused version or token.
        """
        worker = cls(endpoint, token=token, device_of=device_of, lane=lane)
        try:
            worker.greet(timeout_s)
        except BaseException:
            worker.close(0.0)
            raise
        return worker

    def greet(self, timeout_s: float) -> None:
        """Wait until the server has accepted the connection; raises as `connect` does."""
        shared, deadline = self._shared, time.monotonic() + timeout_s
        with shared.changed:
            shared.wait(lambda: shared.greeted or shared.refused is not None or shared.hung_up, timeout_s)
            hung_up = shared.hung_up
        if hung_up:  # an HTTP server never answers: more attempts would only fill its log
            self._check_not_http()
        with shared.changed:
            shared.wait(lambda: shared.greeted or shared.refused is not None, seconds_left(deadline))
            if shared.greeted:
                return
            refused = shared.refused
        if refused is not None:
            raise ConnectError(f"the server at {self._endpoint} refused this client: {refused.text}")
        if self._link.unresolved is not None:
            raise ConnectError(f"{self._link.unresolved}: correct the endpoint {self._endpoint} (EMA_ENDPOINT)")
        if self._link.refused:
            what = f"nothing listens at {self._endpoint}"
        else:
            self._check_not_http()
            what = described(self._endpoint, first_bytes(self._endpoint))
        raise ConnectError(
            f"{what} (waited {timeout_s:g} s): start a server with `ema serve`, and use the address that it prints as "
            '"zmq" (EMA_ENDPOINT)'
        )

    def _check_not_http(self) -> None:
        first = first_bytes(self._endpoint)
        if is_http(first):
            raise ConnectError(
                f'{described(self._endpoint, first)}: use the address that ema serve prints as "zmq" (EMA_ENDPOINT)'
            )

    def join(self, join: m.Join, timeout_s: float, files: tuple[bytes, ...] = ()) -> m.Joined:
        """Join the run and make the slots; return the server's answer.

        One of several ranks learns from the answer how long its snapshots are: they are no longer than what it holds,
        and shared slots of that length are passed before. Otherwise the slots are made first.

        Args:
            join: the request.
            timeout_s: how long the server may be unreachable meanwhile. One that is connected may take longer.
            files: the content of the companion files that `join` lists, kept until the worker is closed.

        Raises:
            JoinError: the server refused (`code` says why), did not answer in time, the slots do not fit in memory, or
                shared memory is asked for and cannot be used.
        """
        shared = self._shared
        self._driver.lend((), files)
        can_share = self._can_share(join)
        if join.world == 1:
            self._make_slots(join, join.manifest.nbytes, files, shared=can_share)
        elif can_share:
            self._reserve_slots(join, files)
        self._driver.do(lambda _: self._sender.join(join))
        with shared.changed:
            shared.wait(lambda: shared.joined or shared.refused or shared.is_down_for(timeout_s), _RESTORE_S)
            if shared.refused is not None:
                raise JoinError(f"run {join.run!r} was refused: {shared.refused.text}", shared.refused.code)
            if shared.joined is None:
                raise JoinError(f"run {join.run!r}: the server at {self._endpoint} has not answered")
            joined, capabilities, problem = shared.joined, shared.capabilities, shared.lane_problem
        nbytes = join.manifest.nbytes
        if joined.send is not None:
            nbytes = part_of(join.manifest, from_ranges(joined.send, len(join.manifest.tensors))).nbytes
            self._make_slots(join, nbytes, files, shared=bool(self.slots))
        if problem is not None and nbytes:
            self._report_no_sharing(join, problem)
        if join.files and m.FILES not in capabilities:
            text = "ema: the server at %s takes no companion files: the versions of run %s are without them; upgrade it"
            log.warning(text, self._endpoint, join.run)
        return joined

    def skip(self, step: int, why: str) -> None:
        """Say, as one rank of several, that nothing is sent of a due step; after what was offered before."""
        self._copies.then(lambda: self._say_skipped(step, why))

    def watch(self, look: Callable[[float], None]) -> None:
        """Have `look(now)` called several times a second by the connection's thread, which must not be held up."""
        self._driver.when_turning = look

    def acquire(self, wait_s: float, *, reconnecting: bool = False) -> Slot | None:
        """A slot to fill, to be passed to `offer` or `give_back`; None when there is none or the connection is down.

        Args:
            wait_s: how long to wait for one, in seconds.
            reconnecting: wait also while the connection is down.
        """
        shared = self._shared

        def settled() -> bool:
            ended = shared.state in (SenderState.FAILED, SenderState.CLOSED)
            return bool(shared.free and shared.streaming) or ended or not (shared.streaming or reconnecting)

        if reconnecting:
            self._wait(settled, wait_s)
        elif not settled():
            self._driver.act_here()  # the answer to an earlier snapshot may have come
        with shared.changed:
            if wait_s > 0 and not reconnecting and not settled():
                self._driver.attend()
                shared.wait(settled, wait_s)
            return shared.free.pop() if shared.free and shared.streaming else None

    def give_back(self, slot: Slot) -> None:
        """Return a slot unused."""
        with self._shared.changed:
            self._shared.free.append(slot)
            self._shared.changed.notify_all()

    def log_outage(self) -> None:
        """Log that the connection is lost, once for each time: when a step is skipped for it, and not at the end."""
        with self._shared.changed:
            outage, logged = self._shared.outage, self._shared.outage_logged
            self._shared.outage_logged = outage is not None
        if outage is not None and not logged:
            log.warning("ema: %s; steps are skipped until %s answers again", outage, self._endpoint)

    def offer(self, slot: Slot, step: int, mode: m.Mode = "update", transfer: AsyncCopy | None = None) -> None:
        """Send the snapshot of `step` that `slot` holds, or will hold once `transfer` is done. Steps must grow."""
        self._copies.put(slot, step, mode, transfer)

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        """Wait until the newest snapshot offered is applied (`durable`: published); False when it is not in time."""
        deadline = time.monotonic() + timeout_s
        if not self._copies.idle(timeout_s):
            return False
        shared = self._shared
        with shared.changed:
            newest = shared.last_offered
            self._driver.attend()
            shared.wait(lambda: shared.in_flight == 0 or shared.refused is not None, seconds_left(deadline))
            if newest is not None and shared.last_committed != newest:
                return False
        return not durable or self._ask(lambda sender: sender.request_publish(pin=False), deadline).error is None

    def checkpoint(self, timeout_s: float) -> Answered:
        """Publish a generation of everything offered so far, kept beyond the newest ones; the answer has its step."""
        return self._ask(lambda sender: sender.request_publish(pin=True), time.monotonic() + timeout_s)

    def publish_soon(self) -> None:
        """Ask for a generation of everything offered so far, without waiting, unless the last such call is unanswered.

        Calls while the server is away would otherwise all be carried out when it is back.
        """
        if self._publishing is None or self._publishing.answer is not None:
            pending = self._publishing = Pending()
            self._copies.then(lambda: self._driver.ask(lambda: self._sender.request_publish(pin=False), pending))

    def finish(self, timeout_s: float) -> Answered:
        """Publish the run and mark it finished; the answer has the step that it ends with."""
        return self._ask(lambda sender: sender.request_finish(), time.monotonic() + timeout_s)

    def rewind(self, step: int, timeout_s: float) -> int | None:
        """Take the run back to its newest generation at or before `step`; return that generation's step.

        Raises:
            RewindError: there is none, or the server did not answer in time.
        """
        answer = self._ask(lambda sender: sender.request_rewind(step), time.monotonic() + timeout_s)
        if answer.error is not None:
            raise RewindError(f"the run was not rewound to step {step}: {answer.error}")
        shared = self._shared
        with shared.changed:
            shared.last_offered = shared.last_committed = shared.last_published = answer.step
        return answer.step

    def close(self, timeout_s: float) -> None:
        """Give snapshots under way at most `timeout_s` seconds, then end the threads and release their memory."""
        deadline = time.monotonic() + timeout_s
        copied = self._copies.close(timeout_s)
        disconnected = self._disconnect(seconds_left(deadline))
        self.pins.release(unused=copied and disconnected)

    def stats(self) -> WorkerStats:
        """A consistent copy of the session's state."""
        shared = self._shared
        with shared.changed:
            return WorkerStats(
                state=shared.state.value,
                offered=shared.offered,
                committed=shared.committed,
                dropped=dict(shared.dropped),
                reconnects=shared.reconnects,
                last_offered_step=shared.last_offered,
                last_committed_step=shared.last_committed,
                last_published_step=shared.last_published,
                lane=shared.lane,
            )

    def applying_s(self) -> tuple[float, ...]:
        """Of the newest snapshots, the time from sending one, or applying the one before, to its being applied."""
        with self._shared.changed:
            return tuple(self._shared.applying_s)

    def _send(self, slot: Slot, step: int, mode: m.Mode) -> None:
        with self._shared.changed:
            self._shared.in_flight += 1
            self._shared.offered += 1
            self._shared.last_offered = step
            self._shared.sent_at[slot.index] = time.monotonic()
        self._driver.do(lambda now: self._sender.offer(slot.index, step, now, mode))

    def _say_skipped(self, step: int, why: str) -> None:
        self._driver.do(lambda _: self._sender.skip(step, why))

    def _can_share(self, join: m.Join) -> bool:
        """Whether to make slots that a server on this machine can map.

        Raises:
            JoinError: they are asked for, and it cannot.
        """
        if self._lane is Lane.ZMQ:
            return False
        with self._shared.changed:
            path = self._shared.shm
        if not self._may_share:
            problem: str | None = "this system has no memory of that kind: it needs Linux"
        elif join.checksum:
            problem = "checksums are asked for, and shared memory has none"
        elif path is None:
            problem = "the server does not offer it (its --shm-folder is off, or its log says why)"
        else:
            problem = why_unreachable(path)
        if problem is not None:
            self._report_no_sharing(join, problem)
        return problem is None

    def _report_no_sharing(self, join: m.Join, problem: str) -> None:
        """Snapshots cannot go through shared memory: log it, or raise if that is asked for."""
        if self._lane is Lane.SHM:
            raise JoinError(f"run {join.run!r} cannot be streamed through shared memory (lane='shm'): {problem}")
        log.info("ema: snapshots go through the socket, not through shared memory: %s", problem)

    def _reserve_slots(self, join: m.Join, files: tuple[bytes, ...]) -> None:
        """Have slots passed to the server that are long enough for all that this rank holds."""
        if join.manifest.nbytes:
            try:
                self.slots = reserve_slots(join.manifest.nbytes, SLOTS)
            except OSError as error:
                self._report_no_memory(join, error)
            self._driver.lend(self.slots, files)

    def _make_slots(self, join: m.Join, nbytes: int, files: tuple[bytes, ...], *, shared: bool) -> None:
        """Make the slots, of the reserved ones if there are; private ones where the system has none to share."""
        slots: tuple[Slot, ...] = ()
        if nbytes and shared and not self.slots:
            try:
                slots = make_slots(nbytes, SLOTS, shared=True)
            except OSError as error:
                self._report_no_memory(join, error)
        if nbytes and not slots:
            try:
                slots = present(self.slots, nbytes) if self.slots else make_slots(nbytes, SLOTS)
            except (OSError, MemoryError) as error:
                text = f"cannot allocate {SLOTS} slots of {nbytes} bytes: {error}"
                raise JoinError(text, RejectCode.OUT_OF_MEMORY) from None
        self.slots = slots
        self._driver.lend(slots, files)
        with self._shared.changed:
            self._shared.free = list(slots)

    def _report_no_memory(self, join: m.Join, error: OSError) -> None:
        self._report_no_sharing(join, f"the system gives no memory for it: {error.strerror}")

    def _disconnect(self, timeout_s: float) -> bool:
        """Say goodbye, end the driver and let go of the slots; False while the driver may still read them."""
        deadline = time.monotonic() + timeout_s
        shared = self._shared
        with shared.changed:
            if shared.streaming:
                self._driver.attend()
                shared.wait(lambda: shared.in_flight == 0 or not shared.streaming, timeout_s)
        self._driver.do(lambda _: self._sender.bye())
        ended = self._driver.stop(max(0.5, seconds_left(deadline)))
        if ended:
            self.slots, shared.free = (), []
        return ended

    def _ask(self, request: Callable[[Sender], int], deadline: float) -> Answered:
        """Make a request about everything offered so far; an answer that does not come in time is an error too."""
        if not self._copies.idle(seconds_left(deadline)):
            return Answered(0, None, "the device has not copied the last snapshot in time")
        return self._request(request, seconds_left(deadline))

    def _request(self, request: Callable[[Sender], int], timeout_s: float) -> Answered:
        pending = self._driver.ask(partial(request, self._sender))
        self._wait(lambda: pending.answer is not None, timeout_s)
        return pending.answer or Answered(0, None, f"the server at {self._endpoint} did not answer in time")

    def _wait(self, until: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a predicate holds; log it if that means waiting for a server that is away."""
        deadline = time.monotonic() + timeout_s
        shared = self._shared
        with shared.changed:
            shared.wait(lambda: until() or shared.outage is not None, timeout_s)
            left_s = seconds_left(deadline)
            outage = shared.outage if left_s >= 1 and not until() else None
            shared.outage_logged = shared.outage_logged or outage is not None
        if outage is not None:
            log.warning("ema: %s; waiting at most %.0f s until %s answers again", outage, left_s, self._endpoint)
        with shared.changed:
            shared.wait(until, left_s)


def seconds_left(deadline: float) -> float:
    """Until a monotonic time, 0 once it has passed."""
    return max(0.0, deadline - time.monotonic())
