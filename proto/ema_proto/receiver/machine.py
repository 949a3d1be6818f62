"""The server's end of the protocol as a state machine: headers, bodies and the time in, messages and events out.

For each message the caller passes the header frame and learns where the body belongs: into a slot (`Payload`), into a
buffer (`Control`, `FileBody`), or nowhere (`Discard`). `events` ask the averager for something; it answers by
`accept_join`, `applied` and so on. Answers with a stale ticket are ignored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.limits import CHUNK_BYTES_DEFAULT, SESSION_LOST_S, SLOTS
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.intake import Intake
from ema_proto.receiver.ownership import Claim, ClaimState, Ownership
from ema_proto.wire import messages as m
from ema_proto.wire.codec import Header, decode, decode_file, decode_header
from ema_proto.wire.files import FileSpec, by_digest


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
        self._connections = Connections(epoch=epoch, token=token, nonce=nonce, chunk_bytes=chunk_bytes)
        self.outbox = self._connections.outbox
        self.rejects = self._connections.rejects
        self.events: deque[e.ReceiverEvent] = deque()
        self._chunk_bytes = chunk_bytes
        self._lost_after_s = lost_after_s
        self._runs = Ownership(self._connections, self.events)
        self._now = 0.0
        self._pending: tuple[Connection, Header] | None = None

    @property
    def greeted(self) -> int:
        """How many connections have been answered by WELCOME so far."""
        return self._connections.greeted

    def header(self, peer: bytes, frame: bytes, now: float) -> e.Target:
        """Take the header frame of a message from `peer`; returns where its body belongs."""
        self._now = now
        connection = self._connections.heard(peer, now)
        self._pending = None
        try:
            header = decode_header(frame)
            if header.type != m.Hello.type:
                self._connections.check_current(connection, header)
        except RemoteProtocolError as error:
            self._connections.refuse(connection, error.code, error.text)
            return e.Discard()
        if header.type == m.File.type:
            return self._file_target(connection, header)
        if header.type != m.Chunk.type:
            self._pending = connection, header
            return e.Control(header.length)
        claim = self._streaming(connection)
        if claim is None or claim.intake is None:
            return e.Discard()
        slot = claim.intake.target(header)
        self._flush(claim)
        if slot is None:
            return e.Discard()
        self._pending = connection, header
        return e.Payload(claim.ticket, slot, header.attempt, header.offset, header.length)

    def payload(self, received: memoryview | bytes | None) -> None:
        """A `Payload` body is in its slot; `received` is that part of the slot, None if the length was wrong."""
        connection, header = self._take_pending()
        claim = self._streaming(connection)
        if claim is not None and claim.intake is not None:
            claim.intake.payload(header, received)
            self._flush(claim)

    def file_payload(self, payload: bytes | None) -> None:
        """A `FileBody` was received; None if its length was wrong."""
        connection, header = self._take_pending()
        claim = self._streaming(connection)
        if claim is None or claim.intake is None:
            return
        try:
            part = decode_file(header)
            file = claim.intake.files.take(part, payload)
            self.events.append(e.FileReceived(claim.run, claim.ticket, file, part.offset, payload or b""))
        except RemoteProtocolError as error:
            self._connections.refuse(connection, error.code, error.text)

    def control(self, body: bytes) -> None:
        """A `Control` body (of any length: it is checked here)."""
        connection, header = self._take_pending()
        try:
            self._take(connection, header, decode(header, body))
        except RemoteProtocolError as error:
            if error.code.scope is Scope.CONNECTION:
                self._connections.refuse(connection, error.code, error.text)
            else:
                self._connections.send(connection.peer, m.Reject(error.code, error.text))

    def tick(self, now: float) -> None:
        """Let time pass: probes expire, silent sessions are lost, silent connections forgotten."""
        self._now = now
        self._runs.tick(now)
        for connection in self._connections.forget_silent(now - self._lost_after_s):
            claim = self._runs.of(connection)
            if claim is not None:
                self._runs.leave(claim, lost=True)

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
        set_aside: str | None = None,
        missing_files: tuple[str, ...] = (),
    ) -> bool:
        """The run is ready and has `slots` slots; False when the session that asked has ended.

        `missing_files` are the sha256 of the JOIN's companion files that are to be sent before snapshots.
        """
        claim = self._runs.by_ticket(run, ticket)
        if claim is None or claim.state is not ClaimState.JOINING:
            return False
        files = claim.join.files
        intake = Intake(
            nbytes=claim.join.manifest.nbytes,
            chunk_bytes=self._chunk_bytes,
            slots=slots,
            checksum=claim.join.checksum,
            last_step=last_step,
            recent=recent,
            files=tuple(files[place] for place in by_digest(files, missing_files)) if files else (),
        )
        self._runs.stream(claim, intake)
        joined = m.Joined(
            last_step,
            published_step,
            tuple(intake.recent),
            continuation,
            intake.credit_limit,
            set_aside=set_aside,
            missing_files=None if files is None else missing_files,
        )
        self._connections.send(claim.peer, joined)
        return True

    def refuse_join(self, run: str, ticket: int, code: RejectCode, text: str) -> None:
        """The run cannot be joined. If a session streamed it before, that one has ended with this."""
        claim = self._runs.by_ticket(run, ticket)
        if claim is not None:
            self._runs.refuse(claim, code, text)

    def file_stored(self, run: str, ticket: int) -> tuple[FileSpec, ...] | None:
        """The oldest unstored part of a companion file is stored; with the last one of a file, the file is durable.

        Returns:
            All files of the JOIN if each of them is whole with this.
        """
        claim = self._runs.by_ticket(run, ticket)
        if claim is None or claim.intake is None:
            return None
        claim.intake.file_stored()
        self._flush(claim)
        return claim.join.files if claim.intake.files.whole else None

    def file_failed(self, run: str, ticket: int, text: str) -> None:
        """A companion file could not be stored, or arrived damaged. The session has ended with this."""
        claim = self._runs.by_ticket(run, ticket)
        if claim is not None:
            self._runs.fail(claim, RejectCode.UNAVAILABLE, text)

    def applied(self, run: str, ticket: int, slot: int) -> None:
        """The snapshot in `slot` is in the averages; the slot is free."""
        claim = self._runs.by_ticket(run, ticket)
        if claim is not None and claim.intake is not None:
            claim.intake.applied(slot)
            self._flush(claim)

    def quarantined(self, run: str, ticket: int, slot: int, text: str) -> None:
        """The snapshot in `slot` was not finite and was not applied; the slot is free."""
        claim = self._runs.by_ticket(run, ticket)
        if claim is not None and claim.intake is not None:
            claim.intake.quarantined(slot, text)
            self._flush(claim)

    def published(self, run: str, step: int) -> None:
        """A generation of the run at `step` is durable."""
        claim = self._runs.owner(run)
        if claim is not None and claim.intake is not None:
            self._connections.send(claim.peer, m.Published(step))

    def publish_answered(self, run: str, ticket: int, request: int, step: int | None, error: str | None = None) -> None:
        """The generation that was asked for is durable at `step`, or (`error`) could not be written."""
        claim = self._runs.by_ticket(run, ticket)
        if claim is not None:
            self._connections.send(claim.peer, m.Published(step, request, error))

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
        claim = self._runs.by_ticket(run, ticket)
        if claim is None or claim.intake is None:
            return
        if error is None:
            claim.intake.rewound(step, recent)
        else:
            claim.intake.cancel_rewind()
        self._connections.send(claim.peer, m.Rewound(request, step, error))
        self._flush(claim)

    def finished(
        self,
        run: str,
        ticket: int,
        request: int,
        step: int | None,
        error: str | None = None,
        warning: str | None = None,
    ) -> None:
        """The run is finished and durable, which ends the session; or (`error`) it is not, and the session goes on."""
        claim = self._runs.by_ticket(run, ticket)
        if claim is None:
            return
        self._connections.send(claim.peer, m.Finished(request, step, error, warning))
        if error is None:
            self._runs.drop(claim)
        else:
            claim.state = ClaimState.STREAMING

    def _take(self, connection: Connection, header: Header, message: m.ControlMessage) -> None:
        match message:
            case m.Hello():
                self._connections.greet(connection, header.session, message)
            case m.Heartbeat():
                if message.reply:
                    self._connections.send(connection.peer, m.Heartbeat())
                else:
                    self._runs.alive(connection, self._now)
            case m.Join():
                self._runs.ask(connection, message, self._now)
            case m.Bye():
                claim = self._runs.of(connection)
                if claim is not None:
                    self._runs.leave(claim, lost=False)
            case m.Begin() | m.Commit() | m.Publish() | m.Rewind() | m.Finish():
                claim = self._streaming(connection)
                if claim is None or claim.intake is None:
                    name = type(message).__name__.upper()
                    raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} was sent outside a joined run")
                self._take_of_run(claim, claim.intake, message)
                self._flush(claim)
            case _:
                name = type(message).__name__.upper()
                raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} is not for a server")

    def _take_of_run(
        self, claim: Claim, intake: Intake, message: m.Begin | m.Commit | m.Publish | m.Rewind | m.Finish
    ) -> None:
        match message:
            case m.Begin():
                intake.begin(message)
            case m.Commit():
                whole = intake.commit(message)
                if whole is not None:
                    slot, begin = whole
                    self.events.append(e.SnapshotReady(claim.run, claim.ticket, slot, begin.step, begin.mode))
            case m.Publish():
                self.events.append(e.PublishRequested(claim.run, claim.ticket, message.request, message.pin))
            case m.Rewind():
                intake.begin_rewind()
                self.events.append(e.RewindRequested(claim.run, claim.ticket, message.request, message.step))
            case m.Finish():
                claim.state = ClaimState.FINISHING
                self.events.append(e.FinishRequested(claim.run, claim.ticket, message.request))

    def _file_target(self, connection: Connection, header: Header) -> e.Target:
        claim = self._streaming(connection)
        if claim is None or claim.intake is None:
            return e.Discard()
        try:
            claim.intake.file_target(decode_file(header))
        except RemoteProtocolError as error:
            self._connections.refuse(connection, error.code, error.text)
            return e.Discard()
        self._pending = connection, header
        return e.FileBody(header.length)

    def _streaming(self, connection: Connection) -> Claim | None:
        claim = self._runs.of(connection)
        return claim if claim is not None and claim.state is ClaimState.STREAMING else None

    def _flush(self, claim: Claim) -> None:
        if claim.intake is not None:
            while claim.intake.replies:
                self._connections.send(claim.peer, claim.intake.replies.popleft())

    def _take_pending(self) -> tuple[Connection, Header]:
        if self._pending is None:
            raise LocalProtocolError("a body came without its header")
        pending, self._pending = self._pending, None
        return pending
