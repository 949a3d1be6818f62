"""The trainer's end of the protocol as a state machine: commands, frames and the time in, frames and events out.

A snapshot is a number of bytes in a numbered slot of the caller's. The caller writes what `next_frame` returns, one
message at a time, and reads `events`. Snapshots and requests keep their order: a PUBLISH offered after step N asks for
a generation that holds step N. What is unanswered when a connection is lost is sent again on the next one, unless
JOINED reports it as applied.

    disconnected --opened--> greeting --WELCOME--> greeted --join--> joining --JOINED--> streaming
    any --lost--> disconnected        any --final REJECT--> failed        any --bye, FINISHED--> closed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from ema_proto.auth import prove
from ema_proto.errors import Cure, LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.limits import ATTEMPTS_MAX, RECONNECT_PAUSE_S, REJOIN_PAUSE_MAX_S, REJOINS_MAX, VERSION_MAJOR
from ema_proto.sender import events as e
from ema_proto.sender.events import SenderState
from ema_proto.sender.send_queue import Outgoing, Phase, Snapshot, StreamQueue
from ema_proto.sender.timeouts import Timeouts
from ema_proto.wire import messages as m
from ema_proto.wire.codec import decode_frames, encode
from ema_proto.wire.parts import from_ranges, part_of

_ENDED = (SenderState.FAILED, SenderState.CLOSED)
_NOT_CONNECTED = (SenderState.DISCONNECTED, SenderState.FAILED, SenderState.CLOSED)


class Sender:
    """One session of a trainer.

    Args:
        session: 16 random bytes, new for each process.
        token: shared secret, or None.
        jitter: returns a number in [0, 1); spreads reconnections.
        capabilities: what the caller supports. Without `files`, or if the server does not support them, JOIN is sent
            without the companion files.
    """

    def __init__(
        self,
        session: bytes,
        *,
        token: str | None,
        jitter: Callable[[], float],
        capabilities: tuple[str, ...] = (m.CRC32,),
    ) -> None:
        self.state = SenderState.DISCONNECTED
        self.events: deque[e.Event] = deque()
        self._session = session
        self._token = token
        self._jitter = jitter
        self._capabilities = capabilities
        self._epoch = 0
        self._welcome: m.Welcome | None = None
        self._join: m.Join | None = None
        self._joined_before = False
        self._refusals = 0  # of the run for now, since the last snapshot was applied; and those of them while streaming
        self._failures = 0
        self._control: deque[tuple[bytes, bytes]] = deque()
        self._stream = StreamQueue()
        self._timeouts = Timeouts()

    def opened(self, now: float) -> None:
        """A fresh transport was opened: send HELLO on it."""
        if self.state is not SenderState.DISCONNECTED:
            raise LocalProtocolError(f"a transport was opened while {self.state.value}")
        self.state = SenderState.GREETING
        self._epoch = 0
        self._send(m.Hello(capabilities=self._capabilities))
        self._timeouts.restart(now)

    def lost(self, now: float, reason: str) -> None:
        """The transport failed."""
        if self.state not in _NOT_CONNECTED:
            self.state = SenderState.DISCONNECTED
            self._control.clear()
            self._stream.restart()
            pause_s = RECONNECT_PAUSE_S * self._jitter()
            if self._refusals > 1:
                pause_s += min(2.0 ** (self._refusals - 2), REJOIN_PAUSE_MAX_S)
            self.events.append(e.ConnectionLost(reason, now + pause_s))

    def join(self, join: m.Join) -> None:
        """Ask for the run, now or as soon as the server has greeted us. Repeated at reconnections."""
        if self._join is not None:
            raise LocalProtocolError(f"this session has joined run {self._join.run!r} already")
        self._join = join
        self._stream.nbytes = join.manifest.nbytes
        self._stream.checksum = join.checksum
        if self._welcome is not None and self.state is SenderState.GREETED:
            self._send_join(join, self._welcome)

    def offer(self, slot: int, step: int, now: float, mode: m.Mode = "update") -> None:
        """Send the snapshot of `step` in `slot`; the slot belongs to the machine until SnapshotDone.

        Raises:
            LocalProtocolError: the step is not after the last one offered.
        """
        if self._join is None:
            raise LocalProtocolError("a snapshot was offered before the run was joined")
        if not self._stream.awaiting:
            self._timeouts.progressed(now)
        self._stream.add_snapshot(slot, step, mode)
        self._return_if_ended()

    def skip(self, step: int, why: str) -> None:
        """Say that this rank sends nothing of a due step, if the run has several ranks.

        Raises:
            LocalProtocolError: the step is not after the last one offered.
        """
        if self._join is not None and self._join.world > 1 and self.state not in _ENDED:
            self._stream.add_skip(step, why)

    def request_publish(self, *, pin: bool) -> int:
        """Ask for a generation of everything offered so far; Answered carries the returned number."""
        return self._request(lambda number: m.Publish(number, pin))

    def request_rewind(self, step: int) -> int:
        """Go back to the newest generation at or before `step`; steps offered later start again after it."""
        return self._request(lambda number: m.Rewind(number, step))

    def request_finish(self) -> int:
        """Complete the run after everything offered so far; the session is closed once that is done."""
        return self._request(m.Finish)

    def bye(self) -> None:
        """Close the session: nothing more is accepted; BYE is the last frame."""
        if self.state in (SenderState.JOINING, SenderState.STREAMING):
            self._send(m.Bye())
        self.state = SenderState.CLOSED
        self._return_if_ended()

    def receive(self, frames: Sequence[bytes], now: float) -> None:
        """Take one message from the server. Anything else ends the connection."""
        if self.state in _NOT_CONNECTED:
            return
        try:
            header, message = decode_frames(frames)
            is_ours = header.session == self._session and header.epoch == (self._epoch or header.epoch)
            if is_ours or isinstance(message, m.Reject):
                self._timeouts.heard(now)
                self._take(message, now)
        except RemoteProtocolError as error:
            if error.code.cure is Cure.FINAL:
                self._fail(error.code, error.text)
            else:
                self.lost(now, f"the server sent something unreadable: {error.text}")

    def tick(self, now: float) -> None:
        """Let time pass: heartbeats, silence, stalls."""
        if self.state in _NOT_CONNECTED:
            return
        greeting = self.state is SenderState.GREETING
        awaiting = self.state is SenderState.JOINING or (self._is_streaming and self._stream.awaiting)
        request = self._stream.request_asked
        reason = self._timeouts.overdue(now, greeting=greeting, awaiting=awaiting, request=request)
        if reason is not None:
            self.lost(now, reason)
        elif not greeting and self._timeouts.beat_is_due(now):
            self._send(m.Heartbeat(reply=True))

    def next_frame(self) -> Outgoing | None:
        """The next message to write, None when there is nothing to write now. It counts as written once returned."""
        if self._control:
            return Outgoing(*self._control.popleft())
        return self._stream.next_frame(self._session, self._epoch) if self._is_streaming else None

    def _send(self, message: m.Message) -> None:
        self._control.append(encode(message, session=self._session, epoch=self._epoch))

    @property
    def _is_streaming(self) -> bool:
        return self.state is SenderState.STREAMING

    def _take(self, message: m.ControlMessage, now: float) -> None:
        match message:
            case m.Reject():
                self._take_reject(message, now)
            case m.Heartbeat():
                if message.reply:
                    self._send(m.Heartbeat())
            case m.Challenge() if self.state is SenderState.GREETING:
                self._take_challenge(message)
            case m.Welcome() if self.state is SenderState.GREETING:
                self._take_welcome(message, now)
            case m.Joined() if self.state is SenderState.JOINING:
                self._take_joined(message, now)
            case m.Credit() | m.Committed() | m.Published() | m.Rewound() | m.Finished() if self._is_streaming:
                self._timeouts.progressed(now)
                self._take_of_run(message, now)
            case (
                m.Hello()
                | m.Join()
                | m.Begin()
                | m.Commit()
                | m.Skip()
                | m.Publish()
                | m.Rewind()
                | m.Finish()
                | m.Bye()
            ):
                name = type(message).__name__.upper()
                raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} is not for a trainer")
            case _:
                pass  # a repeated answer, or an answer to something given up

    def _take_of_run(self, message: m.Credit | m.Committed | m.Published | m.Rewound | m.Finished, now: float) -> None:
        match message:
            case m.Credit():
                self._stream.credit_limit = max(self._stream.credit_limit, message.limit)
            case m.Committed():
                self._take_committed(message, now)
            case m.Published():
                if message.error is None and message.step is not None:
                    self.events.append(e.PublishedAt(message.step))
                self._answer(message.request, message.step, message.error)
            case m.Rewound():
                self._answer(message.request, message.step, message.error)
            case m.Finished():
                answered = self._answer(message.request, message.step, message.error, message.warning)
                if answered and message.error is None:
                    self.state = SenderState.CLOSED
                    self._return_if_ended()

    def _take_challenge(self, challenge: m.Challenge) -> None:
        if self._token is None:
            text = "the server asks for a token: set EMA_TOKEN to the server's"
            raise RemoteProtocolError(RejectCode.UNAUTHORIZED, text)
        self._send(
            m.Hello(
                capabilities=self._capabilities, proof=prove(self._token, nonce=challenge.nonce, session=self._session)
            )
        )

    def _take_welcome(self, welcome: m.Welcome, now: float) -> None:
        if welcome.major != VERSION_MAJOR:
            text = f"the server chose protocol {welcome.major}, this trainer speaks {VERSION_MAJOR}"
            raise RemoteProtocolError(RejectCode.VERSION, f"{text}: upgrade the older side")
        self.state = SenderState.GREETED
        self._timeouts.progressed(now)
        self._epoch = welcome.epoch
        self._welcome = welcome
        self._stream.chunk_bytes = welcome.chunk_bytes
        both = tuple(name for name in self._capabilities if name in welcome.capabilities)
        self.events.append(e.Greeted(both, welcome.shm if m.SHM in both else None))
        if self._join is not None:
            self._send_join(self._join, welcome)

    def _send_join(self, join: m.Join, welcome: m.Welcome) -> None:
        if self._joined_before:
            join = replace(join, reconnect=True, first_step=self._stream.next_step(join.first_step))
        if m.FILES not in self._capabilities or m.FILES not in welcome.capabilities:
            join = replace(join, files=None)
        if join.checksum and m.CRC32 not in welcome.capabilities:
            self._fail(RejectCode.VERSION, "the server cannot check CRC-32: upgrade it, or turn the checksum off")
            return
        try:
            self._send(join)
            self.state = SenderState.JOINING
        except LocalProtocolError as error:
            self._fail(RejectCode.MANIFEST_INVALID, str(error))

    def _take_joined(self, joined: m.Joined, now: float) -> None:
        if self._join is not None:
            self._stream.files.begin(self._join.files or (), joined.missing_files or ())
        if self._join is not None and joined.send is not None:
            manifest = self._join.manifest
            try:
                self._stream.nbytes = part_of(manifest, from_ranges(joined.send, len(manifest.tensors))).nbytes
            except LocalProtocolError as error:
                raise RemoteProtocolError(RejectCode.BAD_MESSAGE, str(error)) from None
        if joined.chunk_bytes is not None:
            self._stream.chunk_bytes = joined.chunk_bytes
        self.state = SenderState.STREAMING
        self._joined_before = True
        self._timeouts.progressed(now)
        self.events.append(e.JoinAccepted(joined))
        for snapshot in self._stream.settle(joined):
            self._done(snapshot)

    def _take_committed(self, committed: m.Committed, now: float) -> None:
        snapshot = self._stream.find(committed.step, committed.attempt)
        if snapshot is None:
            return
        if snapshot.phase is not Phase.AWAITING:
            self.lost(now, f"step {committed.step} was answered before it was sent")
            return
        self._refusals = self._failures = 0
        in_order = self._stream.is_oldest(snapshot)
        self._stream.remove(snapshot)
        self._done(snapshot)
        if not in_order:
            # Snapshots are applied in order: the answer to an earlier one was lost, and JOINED repeats it.
            self.lost(now, f"step {committed.step} was answered before an earlier one")

    def _take_reject(self, reject: m.Reject, now: float) -> None:
        cure = reject.code.cure
        asks_first = self.state is SenderState.JOINING and not self._joined_before
        if reject.scope is Scope.SNAPSHOT:
            self._take_snapshot_reject(reject, cure, now)
        elif reject.code is RejectCode.UNAVAILABLE and not asks_first:
            self._take_unavailable(reject, now)
        elif cure is Cure.RECONNECT or (cure is Cure.REJOIN and not asks_first):
            self.lost(now, f"{reject.code.value}: {reject.text}")
        else:
            self._fail(reject.code, reject.text)

    def _take_unavailable(self, reject: m.Reject, now: float) -> None:
        """The server refuses the run for now: join again, later each time, unless it fails whenever it is streamed."""
        self._refusals += 1
        self._failures += self._is_streaming
        if self._failures > REJOINS_MAX:
            text = f"{reject.text} (joined again {REJOINS_MAX} times, and no snapshot was applied)"
            self._fail(reject.code, text)
        else:
            self.lost(now, f"{reject.code.value}: {reject.text}")

    def _take_snapshot_reject(self, reject: m.Reject, cure: Cure, now: float) -> None:
        self._timeouts.progressed(now)
        snapshot = self._stream.find(reject.step, reject.attempt)
        if snapshot is None:
            return
        if cure is Cure.RESEND and snapshot.tries < ATTEMPTS_MAX and self._stream.resend_from(snapshot):
            return
        self._stream.remove(snapshot)
        snapshot.dropped = reject.code
        self._done(snapshot, reject.text)

    def _done(self, snapshot: Snapshot, text: str | None = None) -> None:
        self.events.append(e.SnapshotDone(snapshot.slot, snapshot.step, snapshot.dropped, text))

    def _request(self, build: Callable[[int], m.Publish | m.Rewind | m.Finish]) -> int:
        number = self._stream.add_request(build)
        self._return_if_ended()
        return number

    def _answer(self, number: int | None, step: int | None, error: str | None, warning: str | None = None) -> bool:
        """Take the answer to a request; False when there is none of this number."""
        request = self._stream.take_answered(number)
        if request is None:
            return False
        self.events.append(e.Answered(request.number, step, error, warning))
        if error is not None:
            for snapshot in self._stream.undo(request):
                self._done(snapshot, f"the run was not taken back: {error}")
        return True

    def _fail(self, code: RejectCode, text: str) -> None:
        self.state = SenderState.FAILED
        self._control.clear()
        self.events.append(e.Refused(code, text))
        self._return_if_ended()

    def _return_if_ended(self) -> None:
        """Return what was offered to a failed or closed session: it will not be sent."""
        if self.state not in _ENDED:
            return
        text = f"the session is {self.state.value}"
        for item in self._stream.clear():
            if isinstance(item, Snapshot):
                item.dropped = RejectCode.UNAVAILABLE
                self._done(item, text)
            else:
                self.events.append(e.Answered(item.number, None, text))
