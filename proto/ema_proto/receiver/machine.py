"""The server's end of the protocol as a state machine: headers, bodies and the time in, messages and events out.

For each message the caller passes the header frame and learns where the body belongs: into a slot (`Payload`), into a
buffer (`Control`, `FileBody`), or nowhere (`Discard`). `events` ask the averager for something; it answers by
`accept_join`, `applied` and so on. Answers with a stale ticket are ignored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError, Scope
from ema_proto.limits import (
    CHUNK_BYTES_DEFAULT,
    CREDIT_WINDOW_CHUNKS,
    PART_WAIT_S,
    RANKS_WAIT_S,
    SERVER_SILENT_S,
    SESSION_LOST_S,
    SLOTS,
)
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.gang import Claim, ClaimState, Gang
from ema_proto.receiver.intake import Intake
from ema_proto.receiver.ownership import Ownership
from ema_proto.wire import messages as m
from ema_proto.wire.codec import Header, decode, decode_file, decode_header
from ema_proto.wire.files import FileSpec, by_digest

_GANG_WINDOW_CHUNKS = 64  # on their way from all ranks of a trainer together, at least two from each


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
        found = self._streaming(connection)
        if found is None:
            return e.Discard()
        gang, claim, intake = found
        slot = intake.target(header)
        self._flush(claim)
        if slot is None:
            return e.Discard()
        self._pending = connection, header
        return e.Payload(gang.ticket, claim.rank, slot, header.attempt, header.offset, header.length)

    def payload(self, received: memoryview | bytes | None) -> None:
        """A `Payload` body is in its slot; `received` is that part of the slot, None if the length was wrong."""
        connection, header = self._take_pending()
        found = self._streaming(connection)
        if found is not None:
            _, claim, intake = found
            intake.payload(header, received)
            self._flush(claim)

    def file_payload(self, payload: bytes | None) -> None:
        """A `FileBody` was received; None if its length was wrong."""
        connection, header = self._take_pending()
        found = self._streaming(connection)
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
            self._leave(connection, lost=True)
        for gang in self._runs.of_several_ranks():
            self._drop_awaited_steps(gang)
            self._report_missing(gang)
        for gang in self._runs.rewinds_due(now):
            self._answer_rewinds(gang, gang.take_rewinds(), None, "not all ranks have asked to go back")

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
        gang = self._runs.by_ticket(run, ticket)
        if gang is None or gang.assembly is not None:
            return False
        gang.start(slots, last_step, recent, published_step)
        gang.missing_files = missing_files
        self._runs.stream(gang)
        for claim in gang.members.values():
            self._admit(gang, claim, continuation, set_aside)
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
        self._flush(claim)
        if not claim.intake.files.whole:
            return None
        gang.missing_files = ()
        return claim.join.files

    def failed(self, run: str, ticket: int, text: str) -> None:
        """The session must join again: a companion file could not be stored, or the run had an internal error."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is not None:
            self._runs.fail(gang, RejectCode.UNAVAILABLE, text)

    def applied(self, run: str, ticket: int, slot: int) -> None:
        """The snapshot in `slot` is in the averages; the slot is free."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is None or gang.assembly is None:
            return
        gang.assembly.applied(slot)
        for claim, intake in _intakes(gang):
            intake.applied(slot)
            self._flush(claim)
        self._admit_returned(gang)

    def quarantined(self, run: str, ticket: int, slot: int, text: str) -> None:
        """The snapshot in `slot` was not finite and was not applied; the slot is free."""
        gang = self._runs.by_ticket(run, ticket)
        if gang is None or gang.assembly is None:
            return
        gang.assembly.quarantined(slot)
        for claim, intake in _intakes(gang):
            intake.quarantined(slot, text)
            self._flush(claim)
        self._admit_returned(gang)

    def published(self, run: str, step: int) -> None:
        """A generation of the run at `step` is durable."""
        gang = self._runs.owner(run)
        if gang is not None:
            gang.published_step = step
            for claim, _ in _intakes(gang):
                self._connections.send(claim.peer, m.Published(step))

    def publish_answered(
        self, run: str, ticket: int, request: int, step: int | None, error: str | None = None, *, rank: int = 0
    ) -> None:
        """The generation that this rank asked for is durable at `step`, or (`error`) could not be written."""
        gang = self._runs.by_ticket(run, ticket)
        claim = None if gang is None else gang.members.get(rank)
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
        gang = self._runs.by_ticket(run, ticket)
        asked = None if gang is None else gang.rewinding.pop(request, None)
        if gang is None or gang.assembly is None or asked is None:
            return
        if error is None:
            gang.assembly.rewound(step, recent)
        self._answer_rewinds(gang, asked, step, error)
        self._admit_returned(gang)

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
        if gang is None:
            return
        if error is None:
            gang.finished = m.Finished(request, step, error, warning)
            self._runs.release(gang)
            if gang.assembly is not None:
                gang.assembly.finish(gang.lead)
                self._report_dropped(gang)
        for claim in list(gang.members.values()):
            if claim.finish is not None:
                self._answer_finish(gang, claim, m.Finished(claim.finish, step, error, warning))

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
                    self._admit_returned(gang)
            case m.Bye():
                self._leave(connection, lost=False)
            case m.Begin() | m.Commit() | m.Skip() | m.Publish() | m.Rewind() | m.Finish():
                found = self._streaming(connection)
                if found is None:
                    name = type(message).__name__.upper()
                    raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} was sent outside a joined run")
                self._take_of_run(*found, message)
                self._flush(found[1])
                self._report_dropped(found[0])
            case _:
                name = type(message).__name__.upper()
                raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"{name} is not for a server")

    def _take_of_run(
        self,
        gang: Gang,
        claim: Claim,
        intake: Intake,
        message: m.Begin | m.Commit | m.Skip | m.Publish | m.Rewind | m.Finish,
    ) -> None:
        match message:
            case m.Begin():
                intake.begin(message, self._now)
            case m.Commit():
                whole = intake.commit(message)
                if whole is not None:
                    slot, begin = whole
                    self.events.append(e.SnapshotReady(gang.run, gang.ticket, slot, begin.step, begin.mode))
            case m.Skip():
                intake.skip(message)
            case m.Publish():
                self.events.append(e.PublishRequested(gang.run, gang.ticket, claim.rank, message.request, message.pin))
            case m.Rewind():
                self._take_rewind(gang, claim, intake, message)
            case m.Finish():
                claim.state, claim.finish = ClaimState.FINISHING, message.request
                if gang.finished is not None:
                    self._answer_finish(gang, claim, replace(gang.finished, request=message.request))
                elif claim.rank == gang.lead:
                    self.events.append(e.FinishRequested(gang.run, gang.ticket, message.request))

    def _file_target(self, connection: Connection, header: Header) -> e.Target:
        found = self._streaming(connection)
        if found is None:
            return e.Discard()
        try:
            found[2].file_target(decode_file(header))
        except RemoteProtocolError as error:
            self._connections.refuse(connection, error.code, error.text)
            return e.Discard()
        self._pending = connection, header
        return e.FileBody(header.length)

    def _admit(self, gang: Gang, claim: Claim, continuation: m.Continuation, set_aside: str | None = None) -> None:
        """The session of a rank streams from now on. Companion files are those of rank 0."""
        assembly = gang.assembly
        if assembly is None:
            return
        claim.state = ClaimState.STREAMING
        assembly.joined(claim.rank, claim.join.first_step)
        files = claim.join.files if claim.rank == 0 else None
        claim.intake = Intake(
            assembly,
            claim.rank,
            nbytes=gang.parts[claim.rank].nbytes,
            chunk_bytes=self._chunk_bytes,
            checksum=claim.join.checksum,
            window=min(CREDIT_WINDOW_CHUNKS, max(2, _GANG_WINDOW_CHUNKS // len(gang.senders))),
            files=tuple(files[place] for place in by_digest(files, gang.missing_files)) if files else (),
        )
        joined = m.Joined(
            assembly.last_step,
            gang.published_step,
            tuple(assembly.recent),
            continuation,
            claim.intake.credit_limit,
            set_aside=set_aside,
            missing_files=None if files is None else gang.missing_files,
            send=gang.send_of(claim.rank),
        )
        self._connections.send(claim.peer, joined)

    def _admit_returned(self, gang: Gang) -> None:
        """Ranks that have reconnected stream again, as soon as it is known which steps are applied."""
        self._report_dropped(gang)
        if gang.assembly is None or gang.assembly.is_applying or gang.rewinding:
            return
        for claim in [claim for claim in gang.members.values() if claim.state is ClaimState.JOINING]:
            if claim.join.manifest == gang.manifests[claim.rank]:
                self._admit(gang, claim, "continued")
                self._report_dropped(gang)
            else:
                text = f"rank {claim.rank} returned with other tensors: start the job again"
                self._connections.send(claim.peer, m.Reject(RejectCode.MANIFEST_CHANGED, text))
                self._runs.leave(gang, claim, lost=False)

    def _leave(self, connection: Connection, *, lost: bool) -> None:
        found = self._runs.of(connection)
        if found is None:
            return
        gang, claim = found
        if gang.assembly is not None and claim.intake is not None:
            gang.assembly.lose(claim.rank, *(("lost", "is lost") if lost else ("left", "has left")))
        if not lost:
            gang.left_at[claim.rank] = self._now
        self._runs.leave(gang, claim, lost=lost)
        self._report_dropped(gang)

    def _drop_awaited_steps(self, gang: Gang) -> None:
        """The other ranks do not wait for one whose connection is gone or silent, or which is late."""
        if gang.assembly is None:
            return
        for rank in gang.assembly.waits_for:
            claim = gang.members.get(rank)
            if claim is None or self._connections.is_silent(claim.peer, self._now - SERVER_SILENT_S):
                gang.assembly.lose(rank, "silent", f"has not been heard for {SERVER_SILENT_S:g} s")
        gang.assembly.drop_overdue(self._now - PART_WAIT_S)
        self._report_dropped(gang)

    def _report_missing(self, gang: Gang) -> None:
        """Report which of the ranks that send something are missing, if that has changed."""
        if gang.assembly is None:
            return
        before = self._now - SERVER_SILENT_S
        missing = []
        for rank in gang.senders:
            claim = gang.members.get(rank)
            is_gone = claim is None and gang.left_at.get(rank, before) <= before
            if is_gone or (claim is not None and self._connections.is_silent(claim.peer, before)):
                missing.append(rank)
        if tuple(missing) != gang.missing_senders:
            gang.missing_senders = tuple(missing)
            self.events.append(e.RanksMissing(gang.run, gang.ticket, gang.missing_senders))

    def _report_dropped(self, gang: Gang) -> None:
        """Tell all ranks which steps cannot be whole any longer."""
        while gang.assembly is not None and gang.assembly.dropped:
            dropped = gang.assembly.dropped.popleft()
            for claim, intake in _intakes(gang):
                intake.dropped(dropped)
                self._flush(claim)
            if gang.world > 1:
                event = e.StepDropped(gang.run, gang.ticket, dropped.step, dropped.rank, dropped.reason, dropped.why)
                self.events.append(event)

    def _take_rewind(self, gang: Gang, claim: Claim, intake: Intake, rewind: m.Rewind) -> None:
        answer = gang.rewound.pop(claim.rank, None)
        if answer is not None and answer.request == rewind.request:
            self._connections.send(claim.peer, answer)
            return
        if not intake.begin_rewind(rewind.request):
            return
        asked = gang.ask_rewind(claim.rank, rewind, self._now + RANKS_WAIT_S)
        if asked is not None:
            self._request_rewind(gang, asked)

    def _request_rewind(self, gang: Gang, asked: dict[int, m.Rewind]) -> None:
        steps = sorted({rewind.step for rewind in asked.values()})
        if len(steps) > 1:
            self._answer_rewinds(gang, asked, None, f"ranks ask to go back to different steps: {steps}")
            return
        request = asked[gang.lead].request
        gang.rewinding[request] = asked
        self.events.append(e.RewindRequested(gang.run, gang.ticket, request, steps[0]))

    def _answer_rewinds(self, gang: Gang, asked: dict[int, m.Rewind], step: int | None, error: str | None) -> None:
        for rank, rewind in asked.items():
            claim, answer = gang.members.get(rank), m.Rewound(rewind.request, step, error)
            if claim is not None and claim.intake is not None and claim.intake.end_rewind(rewind.request):
                self._connections.send(claim.peer, answer)
                self._flush(claim)
            else:
                gang.rewound[rank] = answer

    def _answer_finish(self, gang: Gang, claim: Claim, answer: m.Finished) -> None:
        self._connections.send(claim.peer, answer)
        claim.finish = None
        if answer.error is None:
            self._runs.drop_member(gang, claim)
        else:
            claim.state = ClaimState.STREAMING

    def _streaming(self, connection: Connection) -> tuple[Gang, Claim, Intake] | None:
        found = self._runs.of(connection)
        if found is None or found[1].state is not ClaimState.STREAMING or found[1].intake is None:
            return None
        return found[0], found[1], found[1].intake

    def _flush(self, claim: Claim) -> None:
        if claim.intake is not None:
            while claim.intake.replies:
                self._connections.send(claim.peer, claim.intake.replies.popleft())

    def _take_pending(self) -> tuple[Connection, Header]:
        if self._pending is None:
            raise LocalProtocolError("a body came without its header")
        pending, self._pending = self._pending, None
        return pending


def _intakes(gang: Gang) -> list[tuple[Claim, Intake]]:
    """The sessions of the gang that stream."""
    return [(claim, claim.intake) for claim in gang.members.values() if claim.intake is not None]
