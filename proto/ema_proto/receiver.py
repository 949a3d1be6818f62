"""The server's end of the protocol as a machine: headers, bodies and the time go in, messages and events come out.

It knows neither sockets, memory nor averages. For each message the caller passes the header frame and learns where the
body belongs: into a slot (`Payload`), into a buffer (`Control`), or nowhere (`Discard`). It asks the keeper of the runs
by `events` and is told the outcome by `accept_join`, `applied`, …

A connection is greeted before it may speak; a session owns at most one run; frames count only from its current
connection.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ema_proto import messages as m
from ema_proto.auth import verify
from ema_proto.claims import Claim, Claims, ClaimState
from ema_proto.codec import NO_SESSION, Header, decode, decode_header, encode
from ema_proto.errors import SCOPES, LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.events import (
    FinishRequested,
    JoinRequested,
    PublishRequested,
    ReceiverEvent,
    RewindRequested,
    SessionEnded,
    SnapshotReady,
)
from ema_proto.intake import Intake
from ema_proto.limits import CHUNK_BYTES_DEFAULT, SESSION_LOST_S, SLOTS, VERSION_MAJOR
from ema_proto.names import check_name
from ema_proto.specs import parse_averages


@dataclass(frozen=True, slots=True)
class Payload:
    """Receive exactly `length` bytes into the slot of this ticket's run at `offset`, then call `payload`."""

    ticket: int
    slot: int
    attempt: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Control:
    """Receive a body of `length` bytes and pass it to `control`."""

    length: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop whatever follows the header."""


Target = Payload | Control | Discard


@dataclass(slots=True, eq=False)
class _Connection:
    """One peer of the ROUTER socket. `told` keeps a refusal from being repeated for each stray frame."""

    peer: bytes
    seen_at: float
    session: bytes = NO_SESSION
    nonce: str | None = None
    welcomed: bool = False
    told: bool = False
    run: str | None = None


class Receiver:
    """All connections of one server.

    Args:
        epoch: random number of this server start, not 0.
        token: shared secret, or None.
        nonce: returns fresh random text for a challenge.
        chunk_bytes: how snapshots are to be cut.
        lost_after_s: silence after which a session is lost.
    """

    def __init__(
        self,
        *,
        epoch: int,
        token: str | None,
        nonce: Callable[[], str],
        chunk_bytes: int = CHUNK_BYTES_DEFAULT,
        lost_after_s: float = SESSION_LOST_S,
    ) -> None:
        self.outbox: deque[tuple[bytes, tuple[bytes, bytes]]] = deque()
        self.events: deque[ReceiverEvent] = deque()
        self.rejects: Counter[RejectCode] = Counter()
        self._epoch = epoch
        self._token = token
        self._nonce = nonce
        self._chunk_bytes = chunk_bytes
        self._lost_after_s = lost_after_s
        self._connections: dict[bytes, _Connection] = {}
        self._claims = Claims()
        self._streamed_by: dict[str, bytes] = {}
        self._now = 0.0
        self._pending: tuple[_Connection, Header] | None = None

    # One message: its header, then its payload or control body.

    def header(self, peer: bytes, frame: bytes, now: float) -> Target:
        """Take the header frame of a message from `peer`; says where its body belongs."""
        self._now = now
        connection = self._connections.setdefault(peer, _Connection(peer, now))
        connection.seen_at = now
        self._pending = None
        try:
            header = decode_header(frame)
            if header.type != m.Hello.type:
                self._check_current(connection, header)
        except RemoteProtocolError as error:
            self._refuse_connection(connection, error.code, error.text)
            return Discard()
        if header.type != m.Chunk.type:
            self._pending = connection, header
            return Control(header.length)
        claim = self._streaming(connection)
        if claim is None or claim.intake is None:
            return Discard()
        slot = claim.intake.target(header)
        self._flush(claim)
        if slot is None:
            return Discard()
        self._pending = connection, header
        return Payload(claim.ticket, slot, header.attempt, header.offset, header.length)

    def payload(self, received: memoryview | bytes | None) -> None:
        """A `Payload` body is in its slot; `received` is that part of the slot, None when its length was another."""
        connection, header = self._take_pending()
        claim = self._streaming(connection)
        if claim is not None and claim.intake is not None:
            claim.intake.payload(header, received)
            self._flush(claim)

    def control(self, body: bytes) -> None:
        """A `Control` body (of any length: it is checked here)."""
        connection, header = self._take_pending()
        try:
            self._take(connection, header, decode(header, body))
        except RemoteProtocolError as error:
            if SCOPES[error.code] is Scope.CONNECTION:
                self._refuse_connection(connection, error.code, error.text)
            else:
                self._send(connection.peer, m.Reject(error.code, error.text, header.step, header.attempt))

    def tick(self, now: float) -> None:
        """Let time pass: probes run out, silent sessions are lost, silent connections forgotten."""
        self._now = now
        for rival in self._claims.unanswered(now):
            self._take_over(rival)
        for connection in list(self._connections.values()):
            if now - connection.seen_at > self._lost_after_s:
                self._forget(connection)

    # What the keeper of the runs answers. A stale ticket is ignored: its session is gone.

    def accept_join(
        self,
        run: str,
        ticket: int,
        *,
        last_step: int | None,
        published_step: int | None,
        recent: tuple[int, ...],
        continuation: m.Continuation,
        slots: int = SLOTS,
    ) -> bool:
        """The run is ready and has `slots` slots. False when the session that asked is gone."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is None:
            return False
        claim.state = ClaimState.STREAMING
        self._streamed_by[run] = claim.session
        claim.intake = Intake(
            nbytes=claim.join.manifest.nbytes,
            chunk_bytes=self._chunk_bytes,
            slots=slots,
            checksum=claim.join.checksum,
            last_step=last_step,
            recent=recent,
        )
        self._send(claim.peer, m.Joined(last_step, published_step, recent, continuation, claim.intake.credit_limit))
        return True

    def refuse_join(self, run: str, ticket: int, code: RejectCode, text: str) -> None:
        """The run cannot be joined."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is not None:
            self._end(claim, code, text)

    def applied(self, run: str, ticket: int, slot: int) -> None:
        """The snapshot in `slot` is in the averages; the slot is free."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is not None and claim.intake is not None:
            claim.intake.applied(slot)
            self._flush(claim)

    def quarantined(self, run: str, ticket: int, slot: int, text: str) -> None:
        """The snapshot in `slot` was not finite and touched nothing; the slot is free."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is not None and claim.intake is not None:
            claim.intake.quarantined(slot, text)
            self._flush(claim)

    def published(self, run: str, step: int) -> None:
        """A generation of the run at `step` is durable."""
        claim = self._claims.owner(run)
        if claim is not None and claim.intake is not None:
            self._send(claim.peer, m.Published(step))

    def publish_answered(self, run: str, ticket: int, request: int, step: int | None, error: str | None = None) -> None:
        """The generation that was asked for is durable at `step`, or (`error`) could not be written."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is not None:
            self._send(claim.peer, m.Published(step, request, error))

    def rewound(
        self,
        run: str,
        ticket: int,
        request: int,
        step: int | None,
        *,
        recent: tuple[int, ...] = (),
        error: str | None = None,
    ) -> None:
        """The run is back at `step` with these newest applied steps, or (`error`) unchanged."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is None or claim.intake is None:
            return
        if error is None:
            claim.intake.rewound(step, recent)
        self._send(claim.peer, m.Rewound(request, step, error))
        self._flush(claim)

    def finished(self, run: str, ticket: int, request: int, step: int | None, error: str | None = None) -> None:
        """The run is finished and durable, which ends the session; or (`error`) it is not, and the session goes on."""
        claim = self._claims.by_ticket(run, ticket)
        if claim is None:
            return
        self._send(claim.peer, m.Finished(request, step, error))
        if error is None:
            self._drop(claim)
        else:
            claim.state = ClaimState.STREAMING

    # Messages.

    def _take(self, connection: _Connection, header: Header, message: m.Message) -> None:
        match message:
            case m.Hello():
                self._take_hello(connection, header, message)
            case m.Heartbeat():
                self._take_heartbeat(connection, message)
            case m.Join():
                self._take_join(connection, message)
            case _:
                claim = self._streaming(connection)
                if claim is None or claim.intake is None:
                    name = type(message).__name__.upper()
                    raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} was sent outside a joined run")
                self._take_of_run(claim, claim.intake, message)

    def _take_of_run(self, claim: Claim, intake: Intake, message: m.Message) -> None:
        match message:
            case m.Begin():
                intake.begin(message)
            case m.Commit():
                whole = intake.commit(message)
                if whole is not None:
                    self.events.append(SnapshotReady(claim.run, claim.ticket, whole.slot, whole.step, whole.mode))
            case m.Publish():
                self.events.append(PublishRequested(claim.run, claim.ticket, message.request, message.pin))
            case m.Rewind():
                self.events.append(RewindRequested(claim.run, claim.ticket, message.request, message.step))
            case m.Finish():
                claim.state = ClaimState.FINISHING
                self.events.append(FinishRequested(claim.run, claim.ticket, message.request))
            case m.Bye():
                self._drop(claim)
                self.events.append(SessionEnded(claim.run, claim.ticket, lost=False))
            case _:
                raise RemoteProtocolError(
                    RejectCode.BAD_MESSAGE, f"{type(message).__name__.upper()} is not for a server"
                )
        self._flush(claim)

    def _take_hello(self, connection: _Connection, header: Header, hello: m.Hello) -> None:
        connection.told = False
        connection.session = header.session
        if VERSION_MAJOR not in hello.majors:
            spoken = ", ".join(str(major) for major in hello.majors)
            text = f"this server speaks protocol {VERSION_MAJOR}, the trainer {spoken}: upgrade the older side"
            self._refuse_connection(connection, RejectCode.VERSION, text)
        elif self._token is not None and (hello.proof is None or connection.nonce is None):
            connection.nonce = self._nonce()
            self._send(connection.peer, m.Challenge(connection.nonce))
        elif self._token is not None and not self._is_proven(connection, self._token, hello.proof or ""):
            text = "the token is wrong: set EMA_TOKEN to the server's"
            self._refuse_connection(connection, RejectCode.UNAUTHORIZED, text)
        else:
            connection.welcomed = True
            self._send(connection.peer, m.Welcome(self._epoch, self._chunk_bytes))

    def _is_proven(self, connection: _Connection, token: str, proof: str) -> bool:
        nonce, connection.nonce = connection.nonce or "", None  # a nonce is good for one attempt
        return verify(token, proof, nonce=nonce, session=connection.session)

    def _take_heartbeat(self, connection: _Connection, heartbeat: m.Heartbeat) -> None:
        if heartbeat.reply:
            self._send(connection.peer, m.Heartbeat())
            return
        owner, rival = self._claims.owner(connection.run or ""), self._claims.rival(connection.run or "")
        if owner is not None and rival is not None and owner.peer == connection.peer:
            text = f"run {owner.run!r} has a live trainer: stop that one, or choose another run name"
            self._end(rival, RejectCode.RUN_IN_USE, text)

    def _take_join(self, connection: _Connection, join: m.Join) -> None:
        self._check_join(connection, join)
        connection.run = join.run
        claim = self._claims.new(connection.session, connection.peer, join)
        owner = self._claims.owner(join.run)
        if join.reconnect and self._streamed_by.get(join.run, connection.session) != connection.session:
            self._end(claim, RejectCode.EVICTED, f"another trainer has streamed run {join.run!r} since")
        elif owner is None or owner.session == connection.session or join.incarnation > owner.join.incarnation:
            self._take_over(claim)
        elif join.incarnation < owner.join.incarnation:
            newer = owner.join.incarnation
            text = f"run {join.run!r} has a trainer of incarnation {newer}, this one is {join.incarnation}"
            self._end(claim, RejectCode.EVICTED, text)
        elif self._claims.rival(join.run) is not None:
            self._end(claim, RejectCode.RUN_IN_USE, f"another trainer is asking for run {join.run!r} at this moment")
        else:
            self._claims.wait(claim, self._now)
            self._send(owner.peer, m.Heartbeat(reply=True))

    def _check_join(self, connection: _Connection, join: m.Join) -> None:
        if connection.run is not None:
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"this connection has joined run {connection.run!r}")
        if join.world != 1 or join.rank != 0:
            text = f"rank {join.rank} of {join.world}: sharded models are not served; stream the whole one from rank 0"
            raise RemoteProtocolError(RejectCode.WORLD_UNSUPPORTED, text)
        try:
            check_name("run", join.run)
        except LocalProtocolError as error:
            raise RemoteProtocolError(RejectCode.BAD_RUN, str(error)) from None
        try:
            parse_averages(join.averages)
        except LocalProtocolError as error:
            raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None

    def _take_over(self, claim: Claim) -> None:
        owner = self._claims.owner(claim.run)
        if owner is not None and owner.session != claim.session:
            self._end(owner, RejectCode.EVICTED, f"another trainer took run {owner.run!r} over")
        elif owner is not None:
            self._drop(owner)
            self._unwelcome(owner.peer)
        self._claims.install(claim)
        self.events.append(JoinRequested(claim.run, claim.ticket, claim.join))

    # Connections.

    def _check_current(self, connection: _Connection, header: Header) -> None:
        if header.epoch not in (0, self._epoch):
            raise RemoteProtocolError(RejectCode.STALE_EPOCH, "the server has restarted since: say HELLO again")
        if not connection.welcomed or header.session != connection.session:
            raise RemoteProtocolError(RejectCode.UNKNOWN_CONNECTION, "this connection was not greeted: say HELLO")

    def _streaming(self, connection: _Connection) -> Claim | None:
        claim = self._claims.of_peer(connection.run, connection.peer)
        return claim if claim is not None and claim.state is ClaimState.STREAMING else None

    def _refuse_connection(self, connection: _Connection, code: RejectCode, text: str) -> None:
        connection.welcomed = False
        if connection.told:
            self.rejects[code] += 1
        else:
            connection.told = True
            self._send(connection.peer, m.Reject(code, text))

    def _unwelcome(self, peer: bytes) -> None:
        connection = self._connections.get(peer)
        if connection is not None:
            connection.welcomed, connection.run = False, None

    def _forget(self, connection: _Connection) -> None:
        del self._connections[connection.peer]
        claim = self._claims.of_peer(connection.run, connection.peer)
        if claim is not None:
            is_owner = self._claims.owner(claim.run) is claim
            self._claims.remove(claim)
            if is_owner:
                self.events.append(SessionEnded(claim.run, claim.ticket, lost=True))

    def _end(self, claim: Claim, code: RejectCode, text: str) -> None:
        self._send(claim.peer, m.Reject(code, text))
        self._drop(claim)

    def _drop(self, claim: Claim) -> None:
        self._claims.remove(claim)
        connection = self._connections.get(claim.peer)
        if connection is not None:
            connection.run = None

    def _flush(self, claim: Claim) -> None:
        if claim.intake is not None:
            while claim.intake.replies:
                self._send(claim.peer, claim.intake.replies.popleft())

    def _send(self, peer: bytes, message: m.Message) -> None:
        if isinstance(message, m.Reject):
            self.rejects[message.code] += 1
        connection = self._connections.get(peer)
        if connection is not None:
            self.outbox.append((peer, encode(message, session=connection.session, epoch=self._epoch)))

    def _take_pending(self) -> tuple[_Connection, Header]:
        if self._pending is None:
            raise LocalProtocolError("a body came without its header")
        pending, self._pending = self._pending, None
        return pending
