"""The thread that owns the connection: it drives the sender machine and the link. The main thread only enqueues.

Comes in: snapshots in slots, and requests. Goes out: their outcomes, which the main thread may wait for, each time with
a bound. What both threads see is guarded by one condition, which the worker never holds while it waits.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ema_proto import codec
from ema_proto import messages as m
from ema_proto import sender as machine
from ema_proto import sender_events as e
from ema_proto.errors import RejectCode
from ema_proto.limits import SLOTS
from ema_proto.outbox import Outgoing
from trainer_client.errors import ConnectError, JoinError, RewindError
from trainer_client.link import Link
from trainer_client.slots import Slot, make_slots

logger = logging.getLogger("ema")

_TICK_S = 0.25  # heartbeats are 2 s apart: fine enough, and an idle client wakes four times a second
_REAP_S = 0.002  # a committed slot is released by ZeroMQ's own thread a moment later


@dataclass(slots=True, eq=False)
class _Pending:
    """A request on its way; the answer is set by the worker."""

    answer: e.Answered | None = None


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What the worker has counted. Steps are None before the first."""

    state: str
    offered: int
    committed: int
    dropped: dict[str, int]
    reconnects: int
    last_offered_step: int | None
    last_committed_step: int | None
    last_published_step: int | None


class Worker:
    """One session with the server.

    Args:
        endpoint: where the server listens for trainers.
        token: shared secret, or None.
    """

    def __init__(self, endpoint: str, *, token: str | None) -> None:
        self._link = Link(endpoint)
        self._machine = machine.Sender(secrets.token_bytes(16), token=token, jitter=random.random)
        self._cond = threading.Condition()
        self._commands: deque[Callable[[float], None]] = deque()
        self._stopping = False
        # Only the worker thread touches these four.
        self._retry_at = 0.0
        self._outgoing: Outgoing | None = None
        self._draining: list[Slot] = []
        self._requests: dict[int, _Pending] = {}
        # Both threads, under the condition.
        self._slots: tuple[Slot, ...] = ()
        self._free: list[Slot] = []
        self._greeted = False
        self._joined: m.Joined | None = None
        self._refused: e.Refused | None = None
        self._state = machine.SenderState.DISCONNECTED
        self._in_flight = 0
        self._offered = self._committed = self._reconnects = 0
        self._dropped: Counter[str] = Counter()
        self._last_offered: int | None = None
        self._last_committed: int | None = None
        self._last_published: int | None = None
        self._thread = threading.Thread(target=self._run, name="ema-worker", daemon=True)
        self._thread.start()

    # The main thread's side.

    @property
    def streaming(self) -> bool:
        """Whether the run is joined and the connection is up."""
        return self._state is machine.SenderState.STREAMING

    def greet(self, timeout_s: float) -> None:
        """Wait until the server has accepted the connection.

        Raises:
            ConnectError: nobody answered in time, or version or token were refused.
        """
        with self._cond:
            self._cond.wait_for(lambda: self._greeted or self._refused is not None, timeout_s)
            if self._greeted:
                return
            refused = self._refused
        endpoint = self._link.endpoint
        if refused is not None:
            raise ConnectError(f"the server at {endpoint} refused this client: {refused.text}")
        what = "nothing listens" if self._link.refused else "no ema server answered"
        raise ConnectError(
            f"{what} at {endpoint} ({timeout_s:g} s waited): start one with `ema serve`, or correct the endpoint "
            '(EMA_ENDPOINT); it is the address that the server prints as "zmq"'
        )

    def join(self, join: m.Join, timeout_s: float) -> m.Joined:
        """Make the slots and join the run; return the server's answer.

        Raises:
            JoinError: the server refused (`code` says why), did not answer in time, or the slots do not fit in memory.
        """
        try:
            slots = make_slots(join.manifest.nbytes, SLOTS)
        except (OSError, MemoryError) as error:
            text = f"{SLOTS} slots of {join.manifest.nbytes} bytes cannot be had: {error}"
            raise JoinError(text, RejectCode.OUT_OF_MEMORY) from None
        with self._cond:
            self._slots, self._free = slots, list(slots)
        self._do(lambda _: self._machine.join(join))
        with self._cond:
            self._cond.wait_for(lambda: self._joined is not None or self._refused is not None, timeout_s)
            if self._refused is not None:
                raise JoinError(f"run {join.run!r} was refused: {self._refused.text}", self._refused.code)
            if self._joined is None:
                raise JoinError(
                    f"run {join.run!r}: the server at {self._link.endpoint} gave no answer for {timeout_s:g} s"
                )
            return self._joined

    def acquire(self, wait_s: float) -> Slot | None:
        """A slot to fill, to be passed to `offer` or `give_back`; None when there is none or the connection is down.

        Waits at most `wait_s` seconds for one, and only while connected.
        """
        with self._cond:
            if not self._free and wait_s > 0:
                self._cond.wait_for(lambda: self._free or not self.streaming, wait_s)
            return self._free.pop() if self._free and self.streaming else None

    def give_back(self, slot: Slot) -> None:
        """Return a slot unused."""
        with self._cond:
            self._free.append(slot)

    def offer(self, slot: Slot, step: int, mode: m.Mode = "update") -> None:
        """Send the snapshot of `step` that `slot` holds. Steps must grow."""
        with self._cond:
            self._in_flight += 1
            self._offered += 1
            self._last_offered = step
        self._do(lambda now: self._machine.offer(slot.index, step, now, mode))

    def flush(self, timeout_s: float, *, durable: bool) -> bool:
        """Wait until the newest snapshot offered is applied (`durable`: published); False when it is not in time."""
        deadline = time.monotonic() + timeout_s
        with self._cond:
            newest = self._last_offered
            self._cond.wait_for(lambda: self._in_flight == 0 or self._refused is not None, timeout_s)
            if newest is not None and self._last_committed != newest:
                return False
        return not durable or self._ask_publish(pin=False, timeout_s=deadline - time.monotonic())

    def checkpoint(self, timeout_s: float) -> bool:
        """Publish a generation of everything offered so far, kept beyond the newest ones; False if not in time."""
        return self._ask_publish(pin=True, timeout_s=timeout_s)

    def rewind(self, step: int, timeout_s: float) -> int | None:
        """Take the run back to its newest generation at or before `step`; return that generation's step.

        Raises:
            RewindError: there is none, or the server did not answer in time.
        """
        answer = self._ask(lambda: self._machine.request_rewind(step), timeout_s)
        if answer is None:
            raise RewindError(f"the server at {self._link.endpoint} did not rewind to step {step} in {timeout_s:g} s")
        if answer.error is not None:
            raise RewindError(answer.error)
        with self._cond:
            self._last_offered = self._last_committed = self._last_published = answer.step
        return answer.step

    def finish(self, timeout_s: float) -> bool:
        """Publish the run and mark it finished; False when that is not confirmed in time."""
        answer = self._ask(self._machine.request_finish, timeout_s)
        return answer is not None and answer.error is None

    def close(self, timeout_s: float) -> None:
        """Give snapshots under way at most `timeout_s` seconds, say goodbye, end the thread."""
        deadline = time.monotonic() + timeout_s
        with self._cond:
            if self.streaming:
                self._cond.wait_for(lambda: self._in_flight == 0 or not self.streaming, timeout_s)
        self._do(lambda _: self._machine.bye())
        self._stopping = True
        self._link.wake()
        self._thread.join(max(0.5, deadline - time.monotonic()))

    def stats(self) -> WorkerStats:
        """A consistent copy of the counters."""
        with self._cond:
            return WorkerStats(
                state=self._state.value,
                offered=self._offered,
                committed=self._committed,
                dropped=dict(self._dropped),
                reconnects=self._reconnects,
                last_offered_step=self._last_offered,
                last_committed_step=self._last_committed,
                last_published_step=self._last_published,
            )

    def _do(self, command: Callable[[float], None]) -> None:
        self._commands.append(command)
        self._link.wake()

    def _ask_publish(self, *, pin: bool, timeout_s: float) -> bool:
        answer = self._ask(lambda: self._machine.request_publish(pin=pin), timeout_s)
        return answer is not None and answer.error is None

    def _ask(self, request: Callable[[], int], timeout_s: float) -> e.Answered | None:
        pending = _Pending()

        def ask(_: float) -> None:
            self._requests[request()] = pending

        self._do(ask)
        with self._cond:
            self._cond.wait_for(lambda: pending.answer is not None, max(0.0, timeout_s))
        return pending.answer

    # The worker thread's side.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._run_commands(time.monotonic())
            self._write()
            self._settle()
        except Exception:
            # The trainer goes on whatever happens here; a dead session is told by its state and by this line.
            logger.exception("ema: the connection's thread failed; no more snapshots are sent")
            with self._cond:
                self._refused = e.Refused(RejectCode.UNAVAILABLE, "the connection's thread failed, see the log")
                self._state = machine.SenderState.FAILED
                self._cond.notify_all()
        finally:
            self._link.terminate()

    def _turn(self) -> None:
        now = time.monotonic()
        self._run_commands(now)
        if self._machine.state is machine.SenderState.DISCONNECTED and now >= self._retry_at:
            self._open(now)
        self._machine.tick(now)
        self._write()
        self._settle()
        received = self._link.wait(self._pause_s(now), writable=self._outgoing is not None)
        now = time.monotonic()
        for frames in received.messages:
            self._machine.receive(frames, now)
        if received.broken:
            self._machine.lost(now, "the connection broke")
        self._settle()

    def _run_commands(self, now: float) -> None:
        while self._commands:
            self._commands.popleft()(now)

    def _pause_s(self, now: float) -> float:
        if self._draining:
            return _REAP_S
        if self._machine.state is machine.SenderState.DISCONNECTED:
            return max(0.0, min(_TICK_S, self._retry_at - now))
        return _TICK_S

    def _open(self, now: float) -> None:
        try:
            self._link.open()
        except OSError as error:
            self._retry_at = now + 1.0
            logger.warning("ema: %s", error)
        else:
            self._machine.opened(now)

    def _write(self) -> None:
        while True:
            out = self._outgoing or self._machine.next_frame()
            if out is None:
                return
            self._outgoing = out
            if not self._send(out):
                return
            self._outgoing = None

    def _send(self, out: Outgoing) -> bool:
        payload = out.payload
        if payload is None:
            return self._link.send(out.header, out.body)
        view = self._slots[payload.slot].view[payload.offset : payload.offset + payload.length]
        header = codec.with_crc32(out.header, zlib.crc32(view)) if out.checksum else out.header
        return self._link.send_payload(header, view, payload.slot)

    def _settle(self) -> None:
        """Hand the machine's events and what ZeroMQ has released over to the main thread."""
        with self._cond:
            while self._machine.events:
                self._take(self._machine.events.popleft())
            self._state = self._machine.state
            released = [slot for slot in self._draining if not self._link.in_flight(slot.index)]
            for slot in released:
                self._draining.remove(slot)
                self._free.append(slot)
            self._cond.notify_all()

    def _take(self, event: e.Event) -> None:
        match event:
            case e.Greeted():
                self._greeted = True
            case e.JoinAccepted(joined):
                self._take_joined(joined)
            case e.Refused():
                self._refused = event
                self._link.close()
                if self._joined is not None:
                    logger.error("ema: the run is no longer streamed: %s", event.text)
            case e.ConnectionLost():
                self._take_lost(event)
            case e.SnapshotDone():
                self._take_done(event)
            case e.PublishedAt(step):
                self._last_published = step
            case e.Answered():
                pending = self._requests.pop(event.request, None)
                if pending is not None:
                    pending.answer = event

    def _take_joined(self, joined: m.Joined) -> None:
        if self._joined is not None:
            self._reconnects += 1
            logger.info("ema: connected again; the server is at step %s", joined.last_step)
        self._joined = joined
        self._last_published = joined.published_step

    def _take_lost(self, event: e.ConnectionLost) -> None:
        self._link.close()
        self._outgoing = None
        self._retry_at = event.retry_at
        if self.streaming:  # once for each time it was up, not for each attempt
            logger.warning("ema: %s; steps are skipped until %s answers again", event.reason, self._link.endpoint)

    def _take_done(self, event: e.SnapshotDone) -> None:
        self._in_flight -= 1
        self._draining.append(self._slots[event.slot])
        if event.code is None:
            self._committed += 1
            self._last_committed = event.step
            return
        self._dropped[event.code.value] += 1
        if self.streaming:
            logger.warning("ema: step %d was not applied: %s", event.step, event.text or event.code.value)
