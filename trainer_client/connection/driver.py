"""The thread of the connection: it drives the sender machine and the link.

The training thread gives it commands, and reads in `Shared` what became of them. It never touches a tensor, so the
interpreter may end while it runs.

Small snapshots, and those in shared memory, are sent by the thread that offers them, while that of the connection
rests. In a loop of pure Python another thread gets the interpreter's lock once in 5 ms, and would need it many times.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ema_proto.errors import RejectCode
from ema_proto.sender import events as e
from ema_proto.sender.events import SenderState
from ema_proto.sender.file_queue import FilePayload
from ema_proto.sender.machine import Sender
from ema_proto.sender.send_queue import Outgoing
from ema_proto.wire import codec
from ema_proto.wire.messages import SHM, Joined
from trainer_client.connection.link import Link
from trainer_client.connection.local_socket import LocalSocket
from trainer_client.connection.shared_state import Shared
from trainer_client.staging.slots import Slot

logger = logging.getLogger("ema")

_TICK_S = 0.25  # heartbeats are 2 s apart: fine enough, and an idle client wakes four times a second
_REAP_S = 0.002  # a committed slot is released by ZeroMQ's own thread a moment later
_REOPEN_S = 1.0
_SMALL_BYTES = 1 << 20  # up to this size, copying a snapshot into the socket is cheaper than handing it to the thread
_REST_S = 0.02  # after such a turn; a loop with longer steps leaves the interpreter's lock to this thread often enough


@dataclass(slots=True, eq=False)
class Pending:
    """A request on its way; `answer` is set once, under the condition."""

    answer: e.Answered | None = None


class Driver:
    """One session's connection. From now on only this object uses what it is given; it writes to `shared`.

    Whichever thread holds `_turning` acts.
    """

    def __init__(self, sender: Sender, link: Link, local: LocalSocket, shared: Shared) -> None:
        self._sender = sender
        self._link = link
        self._local = local
        self._local_path: str | None = None  # where the server takes slots, until it has got them
        self._shared = shared
        self._commands: deque[Callable[[float], None]] = deque()
        self._turning = threading.Lock()
        self._is_small = False  # whether the bytes of a snapshot may be sent by the thread that offers it
        self._rests_until = 0.0
        self._failure: Exception | None = None  # of another thread's turn
        self._interrupted = False  # another thread's turn
        self._ended = False
        self._stopping = False
        self._slots: tuple[Slot, ...] = ()
        self._files: tuple[bytes, ...] = ()
        self._draining: list[Slot] = []
        self._requests: dict[int, Pending] = {}
        self._outgoing: Outgoing | None = None
        self._retry_at = 0.0
        self._problem = ""  # why the last attempt to open the link failed
        self._applied_at = 0.0  # when the newest snapshot was
        self._not_finite = 0  # snapshots refused for NaN or Inf since the last applied one
        self.when_turning: Callable[[float], None] = lambda now: None  # called several times a second
        self._thread = threading.Thread(target=self._run, name="ema-driver", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def do(self, command: Callable[[float], None]) -> None:
        """Run `command(now)`, in the calling thread if it can act, else in the driver's. Never blocks."""
        self._commands.append(command)
        if not self.act_here():
            self.attend()

    def act_here(self) -> bool:
        """Exchange messages in the calling thread, if they are small and no other thread does it; never blocks."""
        are_small = self._is_small or self._shared.lane == SHM
        if not (are_small and self._sender.state is SenderState.STREAMING and self._turning.acquire(blocking=False)):
            return False
        try:
            if self._ended:
                return False
            now = time.monotonic()
            self._rests_until = now + _REST_S
            self._run_commands(now)
            self._exchange(now)
        except Exception as error:  # noqa: BLE001  the driver's thread raises it again
            self._failure = error
        except BaseException:  # such as KeyboardInterrupt: a message may be half written
            self._interrupted = True
            raise
        finally:
            self._turning.release()
            if self._failure is not None or self._interrupted or self._sender.state is not SenderState.STREAMING:
                self.attend()
        return True

    def attend(self) -> None:
        """Have the driver's thread act now, because another one waits for it."""
        self._rests_until = 0.0
        self._link.wake()

    def lend(self, slots: tuple[Slot, ...], files: tuple[bytes, ...] = ()) -> None:
        """Set the memory of offered snapshots, by slot index, and of the JOIN's files; before the JOIN."""
        self._slots, self._files = slots, files
        self._is_small = bool(slots) and len(slots[0].view) <= _SMALL_BYTES

    def ask(self, request: Callable[[], int], pending: Pending | None = None) -> Pending:
        """Make a request of the machine; the answer appears in `pending`, by default a new one, which is returned."""
        pending = Pending() if pending is None else pending

        def command(_: float) -> None:
            self._requests[request()] = pending

        self.do(command)
        return pending

    def stop(self, timeout_s: float) -> bool:
        """Run the pending commands, write what can be written, end the thread and ZeroMQ; whether they ended."""
        self._stopping = True
        self.attend()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._turning:
                    self._turn()
                self._pause()
            with self._turning:
                self._run_commands(time.monotonic())
                self._write()
                self._settle()
        except Exception:
            # The training goes on whatever happens here; the state and this line say that the session has ended.
            logger.exception("ema: the connection's thread failed; no more snapshots are sent")
            with self._shared.changed:
                self._shared.refused = e.Refused(RejectCode.UNAVAILABLE, "the connection's thread failed, see the log")
                self._shared.state = SenderState.FAILED
                self._shared.changed.notify_all()
        finally:
            with self._turning:
                self._ended = True
                self._link.terminate()
                self._local.close()
                self._slots, self._draining = (), []

    def _turn(self) -> None:
        now = time.monotonic()
        if self._failure is not None:
            raise self._failure
        if self._interrupted:
            self._interrupted = False
            self._sender.lost(now, "a message was interrupted")
            self._settle()
        self._run_commands(now)
        if self._sender.state is SenderState.DISCONNECTED and now >= self._retry_at:
            self._open(now)
        self.when_turning(now)
        self._exchange(now)
        if self._link.is_broken():
            self._sender.lost(time.monotonic(), "the connection broke")
            self._settle()

    def _exchange(self, now: float) -> None:
        """Write what can be written and take what has come, until there is neither."""
        self._sender.tick(now)
        while True:
            self._pass_slots()
            self._write()
            messages = self._link.receive()
            for frames in messages:
                self._sender.receive(frames, now)
            self._settle()
            if not messages and (self._outgoing is None or not self._link.can_write()):
                return

    def _pause(self) -> None:
        """Wait for something to do; longer while other threads act."""
        self._link.wait(self._pause_s(time.monotonic()))
        while (rest_s := self._rests_until - time.monotonic()) > 0:
            self._link.wait(rest_s, only_wake=True)

    def _run_commands(self, now: float) -> None:
        while self._commands:
            self._commands.popleft()(now)

    def _pause_s(self, now: float) -> float:
        if self._draining:
            return _REAP_S
        if self._sender.state is SenderState.DISCONNECTED:
            return max(0.0, min(_TICK_S, self._retry_at - now))
        return _TICK_S

    def _open(self, now: float) -> None:
        try:
            self._link.open()
        except OSError as error:
            self._retry_at = now + _REOPEN_S
            if self._shared.greeted and str(error) != self._problem:  # before that the constructor says it
                logger.warning("ema: %s", error.strerror)
            self._problem = str(error)
        else:
            self._problem = ""
            self._sender.opened(now)

    def _pass_slots(self) -> None:
        """Give the server shared slots, before the JOIN is written on this connection."""
        if self._local_path is not None and self._slots:
            path, self._local_path = self._local_path, None
            if self._slots[0].descriptor is not None:
                self._local.offer(path, self._slots)

    def _write(self) -> None:
        while True:
            out = self._outgoing or self._sender.next_frame()
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
        source = self._files[payload.file] if isinstance(payload, FilePayload) else self._slots[payload.slot].view
        view = memoryview(source)[payload.offset : payload.offset + payload.length]
        header = codec.with_crc32(out.header, zlib.crc32(view)) if out.checksum else out.header
        if isinstance(payload, FilePayload) or self._is_small:
            return self._link.send(header, view)
        return self._link.send_payload(header, view, payload.slot)

    def _settle(self) -> None:
        """Show the other thread the machine's events, and the slots that ZeroMQ has released."""
        with self._shared.changed:
            while self._sender.events:
                self._take(self._sender.events.popleft())
            self._shared.show(self._sender.state, time.monotonic())
            for slot in [slot for slot in self._draining if not self._link.in_flight(slot.index)]:
                self._draining.remove(slot)
                self._shared.free.append(slot)
            self._shared.changed.notify_all()

    def _take(self, event: e.Event) -> None:
        match event:
            case e.Greeted(capabilities, shm):
                self._shared.greeted = True
                self._shared.shm = self._local_path = shm
                self._shared.capabilities = capabilities
                self._link.prefer()
            case e.JoinAccepted(joined):
                self._take_joined(joined)
            case e.Refused():
                self._shared.refused = event
                self._link.close()
                if self._shared.joined is not None:
                    logger.error("ema: the run is no longer streamed: %s", event.text)
            case e.ConnectionLost():
                self._take_lost(event)
            case e.SnapshotDone():
                self._take_done(event)
            case e.PublishedAt(step):
                self._shared.last_published = step
            case e.Answered():
                pending = self._requests.pop(event.request, None)
                if pending is not None:
                    pending.answer = event

    def _take_joined(self, joined: Joined) -> None:
        self._take_lane(joined.lane)
        if self._shared.joined is not None:
            self._shared.reconnects += 1
            self._log_reconnect(joined.last_step, self._shared.last_committed)
            self._shared.outage, self._shared.outage_logged = None, False
        self._shared.joined = joined
        self._shared.last_published = joined.published_step

    def _take_lane(self, lane: str) -> None:
        """Note how snapshots are sent from now on, and why not through shared memory if they could be."""
        shared, problem = self._shared, None
        if lane != SHM and self._slots and self._slots[0].descriptor is not None:
            problem = (
                "the server does not offer it (its --shm-folder is off, or its log says why)"
                if shared.shm is None
                else self._local.read_problem()
            )
            if shared.lane == SHM:
                text = "ema: snapshots go through the socket from now on, not through shared memory: %s"
                logger.warning(text, problem)
        elif shared.joined is not None and lane != shared.lane:
            logger.info("ema: snapshots go through shared memory again")
        shared.lane_problem = problem
        shared.lane = lane
        self._local.close()

    def _log_reconnect(self, at: int | None, committed: int | None) -> None:
        """A server that was killed continues from its newest generation, which may be behind what it had applied."""
        # As loud as the line that says the connection broke: most scripts show warnings only.
        level = logging.WARNING if self._shared.outage_logged else logging.INFO
        if committed is None or (at is not None and at >= committed):
            where = "the run has no snapshot yet" if at is None else f"the server is at step {at}"
            logger.log(level, "ema: connected again; %s", where)
            return
        self._shared.last_committed = at
        if at is None:
            text = (
                "ema: connected again; the server has no generation of the run, and what it had applied up to step %d "
            )
            logger.warning(text + "is lost and counts as a gap", committed)
        else:
            text = "ema: connected again; the server continues at step %d; %d steps that it had applied since its last "
            logger.warning(text + "generation are lost and count as a gap", at, committed - at)

    def _take_lost(self, event: e.ConnectionLost) -> None:
        self._link.close()
        self._local.close()
        self._local_path = None
        self._outgoing = None
        self._retry_at = event.retry_at
        self._shared.hung_up = self._shared.hung_up or not self._shared.greeted
        if self._shared.streaming:  # once for each time it was up, not for each attempt
            self._shared.outage = event.reason

    def _take_done(self, event: e.SnapshotDone) -> None:
        self._shared.in_flight -= 1
        self._draining.append(self._slots[event.slot])
        sent_at = self._shared.sent_at.pop(event.slot, None)
        if event.code is None:
            now = time.monotonic()
            if sent_at is not None:
                self._shared.applying_s.append(now - max(sent_at, self._applied_at))
            self._applied_at = now
            self._shared.committed += 1
            self._shared.last_committed = event.step
            if self._not_finite:
                logger.warning(
                    "ema: step %d is finite and applied; %d snapshots before it were not", event.step, self._not_finite
                )
            self._not_finite = 0
            return
        self._shared.dropped[event.code.value] += 1
        self._not_finite += event.code is RejectCode.NOT_FINITE
        if self._shared.streaming and self._not_finite <= 1:  # a NaN that stays would warn at every step
            logger.warning("ema: step %d was not applied: %s", event.step, event.text or event.code.value)
