"""Who owns a run: who asks gets it, waits until its owner has been probed, or is refused; who falls silent loses it.

Comes in: JOINs, signs of life, the time. Goes out: refusals and probes to the connections, and events for the keeper.
"""

from __future__ import annotations

from collections import deque

from ema_proto.errors import RejectCode, RemoteProtocolError
from ema_proto.receiver import events as e
from ema_proto.receiver.claims import Claim, Claims, check_join
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.intake import Intake
from ema_proto.wire import messages as m


class Ownership:
    """The sessions of all runs.

    Args:
        connections: where refusals and probes go.
        events: where the keeper is told.
    """

    def __init__(self, connections: Connections, events: deque[e.ReceiverEvent]) -> None:
        self._connections = connections
        self._events = events
        self._claims = Claims()

    def of(self, connection: Connection) -> Claim | None:
        """The claim whose current connection this is."""
        return self._claims.of_peer(connection.run, connection.peer)

    def by_ticket(self, run: str, ticket: int) -> Claim | None:
        """The run's owner, if it still holds this ticket."""
        return self._claims.by_ticket(run, ticket)

    def owner(self, run: str) -> Claim | None:
        """The run's owner."""
        return self._claims.owner(run)

    def stream(self, claim: Claim, intake: Intake) -> None:
        """The owner's snapshots flow from now on."""
        self._claims.stream(claim, intake)

    def alive(self, connection: Connection) -> None:
        """The answer to a probe came in: if it is the owner's, nobody needs to wait for the run any more."""
        owner = self._claims.owner(connection.run)
        if owner is not None and owner.peer == connection.peer:
            self._refuse_rival(owner)

    def tick(self, now: float) -> None:
        """Let time pass: whoever did not answer a probe in time loses the run."""
        for rival in self._claims.unanswered(now):
            self._take_over(rival)

    def refuse(self, claim: Claim, code: RejectCode, text: str) -> None:
        """The keeper cannot give the run. If another session streamed it before, that one has ended with this."""
        self.end(claim, code, text)
        if claim.replaced is not None:
            self._tell_end(claim, lost=True)

    def ask(self, connection: Connection, join: m.Join, now: float) -> None:
        """A greeted connection asks for a run: it gets it, waits for the owner's answer to a probe, or is refused.

        Raises:
            RemoteProtocolError: the JOIN is impossible, or the run is another session's.
        """
        if connection.run is not None:
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"this connection has joined run {connection.run!r}")
        check_join(join)
        claim = self._claims.new(connection.session, connection.peer, join)
        owner = self._claims.judge(claim)
        connection.run = join.run
        if owner is None:
            self._take_over(claim)
        else:
            before = self._claims.rival(join.run)
            if before is not None:
                self._connections.dismiss(before.peer)
            self._claims.wait(claim, now)
            self._connections.send(owner.peer, m.Heartbeat(reply=True))

    def leave(self, claim: Claim, *, lost: bool) -> None:
        """The session said goodbye, or (`lost`) fell silent."""
        is_owner = self._claims.owner(claim.run) is claim
        self.drop(claim)
        if is_owner:
            self._tell_end(claim, lost=lost)

    def end(self, claim: Claim, code: RejectCode, text: str) -> None:
        """Refuse the session the run."""
        self._connections.send(claim.peer, m.Reject(code, text))
        self.drop(claim)

    def drop(self, claim: Claim) -> None:
        """The session has the run no more."""
        self._claims.remove(claim)
        self._connections.leave(claim.peer)

    def _take_over(self, claim: Claim) -> None:
        owner = self._claims.owner(claim.run)
        self._claims.install(claim)
        if owner is not None and owner.session != claim.session:
            self.end(owner, RejectCode.EVICTED, f"another trainer took run {owner.run!r} over")
        elif owner is not None:
            self._connections.dismiss(owner.peer)
        self._refuse_rival(claim)
        self._events.append(e.JoinRequested(claim.run, claim.ticket, claim.join))

    def _refuse_rival(self, owner: Claim) -> None:
        """The run's owner has shown that it lives: nobody else needs to wait for it."""
        rival = self._claims.rival(owner.run)
        if rival is not None:
            text = f"run {owner.run!r} has a live trainer: stop that one, or choose another run name"
            self.end(rival, RejectCode.RUN_IN_USE, text)

    def _tell_end(self, claim: Claim, *, lost: bool) -> None:
        streamed = claim.ticket if claim.intake is not None or claim.replaced is None else claim.replaced
        self._events.append(e.SessionEnded(claim.run, streamed, lost))
