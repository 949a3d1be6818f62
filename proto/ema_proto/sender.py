"""The trainer's end of the protocol as a machine: commands, frames and the time go in, frames and events come out.

It knows neither sockets nor tensors. A snapshot is a number of bytes in a numbered slot of the caller's; the caller
writes what `next_frame` returns, one message at a time, and reads `events`. Snapshots and requests keep their order: a
PUBLISH offered after step N asks for a generation that holds step N. What is unanswered when a connection is lost is
sent again on the next one, unless JOINED says that it was applied.

    disconnected --opened--> greeting --WELCOME--> greeted --join--> joining --JOINED--> streaming
    any --lost--> disconnected        any --final REJECT--> failed        any --bye--> closed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ema_proto import messages as m
from ema_proto.auth import prove
from ema_proto.codec import decode, decode_header, encode
from ema_proto.errors import (
    RECONNECT,
    RESEND,
    LocalProtocolError,
    RejectCode,
    RemoteProtocolError,
    Scope,
)
from ema_proto.limits import (
    ATTEMPTS_MAX,
    HANDSHAKE_S,
    HEARTBEAT_S,
    RECONNECT_PAUSE_S,
    SERVER_SILENT_S,
    STALL_S,
)
from ema_proto.outbox import Outgoing, Request, Snapshot, StreamQueue


class SenderState(Enum):
    """Where the sender is; see the diagram above."""

    DISCONNECTED = "disconnected"
    GREETING = "greeting"
    GREETED = "greeted"
    JOINING = "joining"
    STREAMING = "streaming"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Greeted:
    """The server accepted the connection; version and token are right."""


@dataclass(frozen=True, slots=True)
class JoinAccepted:
    """The run is ours: snapshots flow."""

    joined: m.Joined


@dataclass(frozen=True, slots=True)
class Refused:
    """A final refusal of the connection or the run; nothing will be sent any more."""

    code: RejectCode
    text: str


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Close the transport, and open a fresh one at `retry_at`."""

    reason: str
    retry_at: float


@dataclass(frozen=True, slots=True)
class SnapshotDone:
    """The slot is the caller's again. `code` and `text` say why a snapshot was not applied; both None when it was."""

    slot: int
    step: int
    code: RejectCode | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PublishedAt:
    """A generation at `step` became durable."""

    step: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A request of ours is done; with `error`, it was refused."""

    request: int
    step: int | None
    error: str | None = None


Event = Greeted | JoinAccepted | Refused | ConnectionLost | SnapshotDone | PublishedAt | Answered


class Sender:
    """One session of a trainer.

    Args:
        session: 16 random bytes, new for each process.
        token: shared secret, or None.
        jitter: returns a number in [0, 1); spreads reconnections.
    """

    def __init__(self, session: bytes, *, token: str | None, jitter: Callable[[], float]) -> None:
        self.state = SenderState.DISCONNECTED
        self.events: deque[Event] = deque()
        self._session = session
        self._token = token
        self._jitter = jitter
        self._epoch = 0
        self._chunk_bytes = 0
        self._join: m.Join | None = None
        self._joined_before = False
        self._control: deque[m.Message] = deque()
        self._stream = StreamQueue()
        self._requests = 0
        self._heard_at = self._opened_at = self._beat_at = self._progress_at = 0.0

    # Commands.

    def opened(self, now: float) -> None:
        """A fresh transport is there: greet the server on it."""
        if self.state is not SenderState.DISCONNECTED:
            raise LocalProtocolError(f"a transport was opened while {self.state.value}")
        self.state = SenderState.GREETING
        self._epoch = 0
        self._control.clear()
        self._control.append(m.Hello())
        self._heard_at = self._opened_at = self._beat_at = self._progress_at = now

    def lost(self, now: float, reason: str) -> None:
        """The transport failed, as the caller saw."""
        if self.state not in (SenderState.DISCONNECTED, SenderState.FAILED, SenderState.CLOSED):
            self.state = SenderState.DISCONNECTED
            self._control.clear()
            self._stream.restart()
            self.events.append(ConnectionLost(reason, now + RECONNECT_PAUSE_S * self._jitter()))

    def join(self, join: m.Join) -> None:
        """Ask for the run, now or as soon as the server has greeted us. Remembered for reconnections."""
        if self._join is not None:
            raise LocalProtocolError(f"this session has joined run {self._join.run!r} already")
        self._join = join
        self._stream.nbytes = join.manifest.nbytes
        self._stream.checksum = join.checksum
        if self.state is SenderState.GREETED:
            self._send_join()

    def offer(self, slot: int, step: int, now: float, mode: m.Mode = "update") -> None:
        """Send the snapshot of `step` that lies in `slot`; the slot is the machine's until SnapshotDone.

        Raises:
            LocalProtocolError: the step is not after the last one offered.
        """
        if self._join is None:
            raise LocalProtocolError("a snapshot was offered before the run was joined")
        if not self._stream.awaiting:
            self._progress_at = now
        self._stream.add_snapshot(slot, step, mode)
        self._drop_if_over()

    def request_publish(self, *, pin: bool) -> int:
        """Ask for a generation of everything offered so far; Answered carries the returned number."""
        return self._request(lambda number: m.Publish(number, pin))

    def request_rewind(self, step: int) -> int:
        """Go back to the newest generation at or before `step`; steps offered later start again after it."""
        number = self._request(lambda number: m.Rewind(number, step))
        self._stream.last_step = step
        return number

    def request_finish(self) -> int:
        """Complete the run after everything offered so far."""
        return self._request(m.Finish)

    def bye(self) -> None:
        """Say goodbye: nothing is accepted any more; BYE is the last frame."""
        if self.state is SenderState.STREAMING:
            self._control.append(m.Bye())
        self.state = SenderState.CLOSED
        self._drop_if_over()

    # Frames.

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        """Take one message from the server. Anything that is no such message ends the connection."""
        if self.state in (SenderState.DISCONNECTED, SenderState.FAILED, SenderState.CLOSED):
            return
        try:
            if len(frames) != 2:
                raise RemoteProtocolError(RejectCode.BAD_FRAME, f"the message has {len(frames)} frames, not 2")
            header = decode_header(frames[0])
            message = decode(header, frames[1])
        except RemoteProtocolError as error:
            self.lost(now, f"the server sent something unreadable: {error.text}")
            return
        if header.session != self._session:
            return
        self._heard_at = now
        self._take(message, now)

    def tick(self, now: float) -> None:
        """Let time pass: heartbeats, silence, stalls."""
        if self.state in (SenderState.DISCONNECTED, SenderState.FAILED, SenderState.CLOSED):
            return
        if self.state is SenderState.GREETING and now - self._opened_at > HANDSHAKE_S:
            self.lost(now, "no answer to HELLO")
        elif now - self._heard_at > SERVER_SILENT_S:
            self.lost(now, f"nothing heard for {SERVER_SILENT_S:.0f} s")
        elif self._awaits_progress and now - self._progress_at > STALL_S:
            self.lost(now, f"no answer to JOIN or to a snapshot for {STALL_S:.0f} s")
        elif self.state is not SenderState.GREETING and now - self._beat_at >= HEARTBEAT_S:
            self._beat_at = now
            self._control.append(m.Heartbeat(reply=True))

    def next_frame(self) -> Outgoing | None:
        """The next message to write, None when there is nothing to write now. It counts as written once returned."""
        if self._control:
            return Outgoing(*encode(self._control.popleft(), session=self._session, epoch=self._epoch))
        if self.state is not SenderState.STREAMING:
            return None
        return self._stream.next_frame(self._session, self._epoch)

    @property
    def _awaits_progress(self) -> bool:
        return self.state is SenderState.JOINING or (self.state is SenderState.STREAMING and self._stream.awaiting)

    # Answers.

    def _take(self, message: m.Message, now: float) -> None:
        match message:
            case m.Challenge():
                self._take_challenge(message)
            case m.Welcome():
                self._take_welcome(message, now)
            case m.Joined():
                self._take_joined(message, now)
            case m.Credit():
                self._progress_at = now
                self._stream.credit_limit = max(self._stream.credit_limit, message.limit)
            case m.Committed():
                self._take_committed(message, now)
            case m.Published():
                if message.error is None and message.step is not None:
                    self.events.append(PublishedAt(message.step))
                self._answer(message.request, message.step, message.error)
            case m.Rewound():
                self._answer(message.request, message.step, message.error)
            case m.Finished():
                self._answer(message.request, message.step, message.error)
                if message.error is None:
                    self.bye()
            case m.Heartbeat():
                if message.reply:
                    self._control.append(m.Heartbeat())
            case m.Reject():
                self._take_reject(message, now)
            case _:
                self.lost(now, f"the server sent a {type(message).__name__}")

    def _take_challenge(self, challenge: m.Challenge) -> None:
        if self._token is None:
            self._fail(RejectCode.UNAUTHORIZED, "the server asks for a token: set EMA_TOKEN to the server's")
        elif self.state is SenderState.GREETING:
            proof = prove(self._token, nonce=challenge.nonce, session=self._session)
            self._control.append(m.Hello(proof=proof))

    def _take_welcome(self, welcome: m.Welcome, now: float) -> None:
        if self.state is not SenderState.GREETING:
            return
        self.state = SenderState.GREETED
        self._progress_at = now
        self._epoch = welcome.epoch
        self._chunk_bytes = welcome.chunk_bytes
        self.events.append(Greeted())
        if self._join is not None:
            self._send_join()

    def _send_join(self) -> None:
        if self._join is None:
            raise LocalProtocolError("there is no run to join")
        join = self._join
        if self._joined_before:
            join = replace(join, reconnect=True, first_step=self._stream.next_step(join.first_step))
        self.state = SenderState.JOINING
        self._control.append(join)

    def _take_joined(self, joined: m.Joined, now: float) -> None:
        if self.state is not SenderState.JOINING:
            return
        self.state = SenderState.STREAMING
        self._joined_before = True
        self._progress_at = now
        self.events.append(JoinAccepted(joined))
        for snapshot in self._stream.settle(joined, self._chunk_bytes):
            self._done(snapshot)

    def _take_committed(self, committed: m.Committed, now: float) -> None:
        self._progress_at = now
        snapshot = self._stream.find(committed.step, committed.attempt)
        if snapshot is None:
            return
        in_order = self._stream.is_oldest(snapshot)
        self._stream.remove(snapshot)
        self._done(snapshot)
        if not in_order:
            # Snapshots are applied in order: the answer to an earlier one was lost, and JOINED will give it again.
            self.lost(now, f"step {committed.step} was answered before an earlier one")

    def _take_reject(self, reject: m.Reject, now: float) -> None:
        if reject.scope is Scope.SNAPSHOT:
            self._progress_at = now
            self._take_snapshot_reject(reject)
        elif reject.code in RECONNECT and not (self.state is SenderState.JOINING and not self._joined_before):
            self.lost(now, f"{reject.code.value}: {reject.text}")
        else:
            self._fail(reject.code, reject.text)

    def _take_snapshot_reject(self, reject: m.Reject) -> None:
        snapshot = self._stream.find(reject.step, reject.attempt)
        if snapshot is None:
            return
        if reject.code in RESEND and snapshot.tries < ATTEMPTS_MAX and self._stream.resend_from(snapshot):
            return
        self._stream.remove(snapshot)
        self._done(snapshot, reject.code, reject.text)

    def _done(self, snapshot: Snapshot | None, code: RejectCode | None = None, text: str | None = None) -> None:
        if snapshot is not None:
            code = code if code is not None else snapshot.dropped
            self.events.append(SnapshotDone(snapshot.slot, snapshot.step, code, text))

    def _request(self, build: Callable[[int], m.Publish | m.Rewind | m.Finish]) -> int:
        self._requests += 1
        self._stream.add_request(Request(self._requests, build(self._requests)))
        self._drop_if_over()
        return self._requests

    def _answer(self, number: int | None, step: int | None, error: str | None) -> None:
        if number is not None and self._stream.take_answered(number):
            self.events.append(Answered(number, step, error))

    def _fail(self, code: RejectCode, text: str) -> None:
        self.state = SenderState.FAILED
        self._control.clear()
        self.events.append(Refused(code, text))
        self._drop_if_over()

    def _drop_if_over(self) -> None:
        """Nothing offered to a failed or closed session will be sent: give it back at once."""
        if self.state not in (SenderState.FAILED, SenderState.CLOSED):
            return
        for item in self._stream.clear():
            if isinstance(item, Snapshot):
                self._done(item, RejectCode.UNAVAILABLE, f"the session is {self.state.value}")
            else:
                self.events.append(Answered(item.number, None, f"the session is {self.state.value}"))
