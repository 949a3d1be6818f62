"""The server's end of the protocol as a state machine: headers, bodies and the time in, messages and events out.

For each message the caller passes the header frame and learns where the body belongs: into a slot (`Payload`), into a
buffer (`Control`, `FileBody`), or nowhere (`Discard`). `events` ask the averager for something; it answers by
`accept_join`, `applied` and so on. Answers with a stale ticket are ignored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.limits import CHUNK_BYTES_DEFAULT, CONTROL_BODY_BYTES_MAX, SESSION_LOST_S, SLOTS
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.ownership import Ownership, check_join
from ema_proto.receiver.requests import Requests
from ema_proto.receiver.streaming import Session, Streaming
from ema_proto.wire import messages as m
from ema_proto.wire.codec import Header, decode, decode_file, decode_header
from ema_proto.wire.files import FileSpec

_WAITING_BYTES_MAX = 64 << 20  # of JOINs that wait; further ones are read at once


@dataclass(frozen=True, slots=True, eq=False)
class UnreadJoin:
    """A large JOIN. To read it takes seconds: any thread may do it."""

    connection: Connection
    header: Header
    body: bytes

    def read(self) -> m.ControlMessage | RemoteProtocolError:
        """The message, or why it is refused."""
        return _decoded(self.header, self.body)


class Receiver:
    """All connections of one server.

    Args:
        epoch: random number of this server start, not 0.
        token: shared secret, or None.
        nonce: returns fresh random text for a challenge.
        chunk_bytes: how snapshots are to be cut.
        lost_after_s: silence after which a session is lost.
        shm: path of the socket on which the caller takes shared slots, None without one.
    """

    def __init__(
        self,
        *,
        epoch: int,
        token: str | None,
        nonce: Callable[[], str],
        chunk_bytes: int = CHUNK_BYTES_DEFAULT,
        lost_after_s: float = SESSION_LOST_S,
        shm: str | None = None,
    ) -> None:
        self._connections = Connections(epoch=epoch, token=token, nonce=nonce, chunk_bytes=chunk_bytes, shm=shm)
        self.outbox = self._connections.outbox
        self.rejects = self._connections.rejects
        self.events: deque[e.ReceiverEvent] = deque()
        self._lost_after_s = lost_after_s
        self._runs = Ownership(self._connections, self.events)
        self._streaming = Streaming(self._connections, self._runs, self.events, chunk_bytes=chunk_bytes)
        self._requests = Requests(self._connections, self._runs, self._streaming, self.events)
        self._now = 0.0
        self._pending: tuple[Connection, Header] | None = None
        self._joins: deque[UnreadJoin] = deque()  # those that `tick` reads
        self._taken: list[UnreadJoin] = []  # those that the caller reads

    @property
    def greeted(self) -> int:
        """How many connections have been answered by WELCOME so far."""
        return self._connections.greeted

    @property
    def has_work(self) -> bool:
        """Whether `tick` has work left: large JOINs, or the manifests of many ranks, which are merged in pieces."""
        return bool(self._joins) or self._runs.is_merging

    def is_greeted(self, peer: bytes) -> bool:
        """Whether the HELLO of this connection was accepted."""
        return self._connections.is_greeted(peer)

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
        found = self._streaming.of(connection)
        if found is None:
            return e.Discard()
        gang, claim, intake = found
        slot = intake.target(header)
        self._streaming.flush(claim)
        if slot is None:
            return e.Discard()
        self._pending = connection, header
        return e.Payload(gang.ticket, claim.rank, slot, header.attempt, header.offset, header.length)

    def payload(self, received: memoryview | bytes | None) -> None:
        """A `Payload` body is in its slot; `received` is that part of the slot, None if the length was wrong."""
        connection, header = self._take_pending()
        found = self._streaming.of(connection)
        if found is not None:
            _, claim, intake = found
            intake.payload(header, received)
            self._streaming.flush(claim)

    def file_payload(self, payload: bytes | None) -> None:
        """A `FileBody` was received; None if its length was wrong."""
        connection, header = self._take_pending()
        found = self._streaming.of(connection)
        if found is None:
            return
        gang, _, intake = found
        try:
            part = decode_file(header)
            file = intake.files.take(part, payload)
            self.events.append(e.FileReceived(gang.run, gang.ticket, file, part.offset, payload or b""))
        except RemoteProtocolError as error:
            self._connections.refuse(connection, error.code, error.text)

    def control(self, body: bytes) -> None:
        """A `Control` body (of any length: it is checked here)."""
        connection, header = self._take_pending()
        waiting = sum(len(each.body) for each in (*self._joins, *self._taken))
        if header.type == m.Join.type and CONTROL_BODY_BYTES_MAX < len(body) <= _WAITING_BYTES_MAX - waiting:
            self._joins.append(UnreadJoin(connection, header, body))
        else:
            self._read(connection, header, _decoded(header, body))

    def take_join(self) -> UnreadJoin | None:
        """The oldest large JOIN, which the caller reads and passes to `join_read`; None without one."""
        if not self._joins:
            return None
        unread = self._joins.popleft()
        self._taken.append(unread)
        return unread

    def join_read(self, unread: UnreadJoin, message: m.ControlMessage | RemoteProtocolError) -> None:
        """A JOIN that was taken is read. It is dropped if its connection has ended, or has said BYE."""
        if unread in self._taken:
            self._taken.remove(unread)
            if self._connections.is_current(unread.connection):
                self._read(unread.connection, unread.header, message)

    def _read(self, connection: Connection, header: Header, message: m.ControlMessage | RemoteProtocolError) -> None:
        try:
            if isinstance(message, RemoteProtocolError):
                raise message
            self._take(connection, header, message)
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
            self._streaming.leave(connection, now, lost=True)
        self._read_waiting_join()
        self._streaming.tick(now)
        self._requests.tick(now)

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
        shared: Mapping[int, int] = MappingProxyType({}),
        reads_in_place: bool = False,
    ) -> bool:
        """The run is ready and has `slots` slots; False when the session that asked has ended.

        `missing_files` are the sha256 of the JOIN's companion files that are to be sent before snapshots. `shared` is
        the number of slots of each rank whose slots the caller has mapped: it copies parts from there, or reads whole
        snapshots in place.
        """
        gang = self._runs.by_ticket(run, ticket)
        if gang is None or gang.assembly is not None:
            return False
        gang.start(slots, last_step, recent, published_step)
        gang.missing_files, gang.shared, gang.reads_in_place = missing_files, shared, reads_in_place
        self._streaming.start(gang, continuation, set_aside)
        return True

    def refuse_join(self, run: str, ticket: int, code: RejectCode, text: str) -> None:
        """The run cannot be joined. If a session streamed it before, that one has ended with this."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._runs.refuse(gang, code, text)

    def file_stored(self, run: str, ticket: int) -> tuple[FileSpec, ...] | None:
        """The oldest unstored part of a companion file is stored; with the last one of a file, the file is durable.

        Returns:
            All files of the JOIN if each of them is whole with this.
        """
        gang = self._runs.by_ticket(run, ticket)
        claim = None if gang is None else gang.members.get(0)
        if gang is None or claim is None or claim.intake is None:
            return None
        claim.intake.file_stored()
        self._streaming.flush(claim)
        if not claim.intake.files.whole:
            return None
        gang.missing_files = ()
        return claim.join.files

    def failed(self, run: str, ticket: int, text: str) -> None:
        """The session must join again: a companion file could not be stored, or the run had an internal error."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._runs.fail(gang, RejectCode.UNAVAILABLE, text)

    def copied(self, part: e.PartReady) -> None:
        """The part is in its places."""
        gang = self._runs.by_ticket(part.run, part.ticket)
        if gang is not None:
            self._streaming.copied(gang, part)

    def applied(self, run: str, ticket: int, slot: int) -> None:
        """The snapshot in `slot` is in the averages; the slot is free."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._streaming.applied(gang, slot)

    def quarantined(self, run: str, ticket: int, slot: int, text: str) -> None:
        """The snapshot in `slot` was not finite and was not applied; the slot is free."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._streaming.quarantined(gang, slot, text)

    def published(self, run: str, step: int) -> None:
        """A generation of the run at `step` is durable."""
        gang = self._runs.owner(run)
        if gang is not None:
            self._streaming.published(gang, step)

    def publish_answered(
        self, run: str, ticket: int, request: int, step: int | None, error: str | None = None, *, rank: int = 0
    ) -> None:
        """The generation that this rank asked for is durable at `step`, or (`error`) could not be written."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._requests.publish_answered(gang, rank, m.Published(step, request, error))

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
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._requests.rewound(gang, request, step, recent, error)

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
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._requests.finished(gang, m.Finished(request, step, error, warning), self._now)

    def _read_waiting_join(self) -> None:
        """Read one large JOIN: when hundreds of ranks join at once, other runs are served in between."""
        if not self._joins:
            return
        unread = self._joins.popleft()
        if self._connections.is_current(unread.connection):
            self._read(unread.connection, unread.header, unread.read())

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
                gang = self._runs.ask(connection, message, self._now)
                if gang is not None:
                    self._streaming.admit_returned(gang)
            case m.Bye():
                self._joins = deque(join for join in self._joins if join.connection is not connection)
                self._taken = [join for join in self._taken if join.connection is not connection]
                self._streaming.leave(connection, self._now, lost=False)
            case m.Begin() | m.Commit() | m.Skip() | m.Publish() | m.Rewind() | m.Finish():
                found = self._streaming.of(connection)
                if found is None:
                    name = type(message).__name__.upper()
                    raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} was sent outside a joined run")
                self._take_of_run(found, message)
                self._streaming.flush(found[1])
                self._streaming.report_dropped(found[0])
            case _:
                name = type(message).__name__.upper()
                raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} is not for a server")

    def _take_of_run(
        self, session: Session, message: m.Begin | m.Commit | m.Skip | m.Publish | m.Rewind | m.Finish
    ) -> None:
        gang, claim, intake = session
        match message:
            case m.Begin():
                intake.begin(message, self._now)
            case m.Commit():
                filled = intake.commit(message)
                if filled is not None:
                    self._streaming.filled(gang, claim, filled)
            case m.Skip():
                intake.skip(message)
            case m.Publish():
                self._requests.publish(gang, claim, message)
            case m.Rewind():
                self._requests.rewind(gang, claim, intake, message, self._now)
            case m.Finish():
                self._requests.finish(gang, claim, message)

    def _file_target(self, connection: Connection, header: Header) -> e.Target:
        found = self._streaming.of(connection)
        if found is None:
            return e.Discard()
        try:
            found[2].file_target(decode_file(header))
        except RemoteProtocolError as error:
            self._connections.refuse(connection, error.code, error.text)
            return e.Discard()
        self._pending = connection, header
        return e.FileBody(header.length)

    def _take_pending(self) -> tuple[Connection, Header]:
        if self._pending is None:
            raise LocalProtocolError("a body came without its header")
        pending, self._pending = self._pending, None
        return pending


def _decoded(header: Header, body: bytes) -> m.ControlMessage | RemoteProtocolError:
    """The message, or why it is refused."""
    try:
        message = decode(header, body)
        if isinstance(message, m.Join):
            check_join(message)
    except RemoteProtocolError as error:
        return error
    return message
