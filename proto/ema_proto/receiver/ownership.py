"""Which session owns which run. A JOIN gets the run, waits while its owner is probed, or is refused."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from ema_proto.averages.rules import check_matches
from ema_proto.averages.specs import parse_averages
from ema_proto.averages.step_units import check_step_units
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import PROBE_S, RUNS_REMEMBERED_MAX
from ema_proto.names import check_name
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.intake import Intake
from ema_proto.wire import messages as m
from ema_proto.wire.body import shown


class ClaimState(Enum):
    PROBING = "probing"
    JOINING = "joining"
    STREAMING = "streaming"
    FINISHING = "finishing"


@dataclass(slots=True, eq=False)
class Claim:
    """A session and the run that it owns or asks for; `intake` once it streams.

    `replaced` is the ticket of the session that streamed before this one took the run over. The end of that session is
    reported only if this claim never streams itself. `since` is when the session first asked for the run.
    """

    ticket: int
    session: bytes
    peer: bytes
    join: m.Join
    since: float
    state: ClaimState = ClaimState.JOINING
    probe_until: float = 0.0
    replaced: int | None = None
    intake: Intake | None = None

    @property
    def run(self) -> str:
        return self.join.run


class Ownership:
    """The sessions of all runs: one owner and at most one rival, which waits for the owner's answer to a probe, each.

    Args:
        connections: where refusals and probes go.
        events: where requests for the averager are appended.
    """

    def __init__(self, connections: Connections, events: deque[e.ReceiverEvent]) -> None:
        self._connections = connections
        self._events = events
        self._owners: dict[str, Claim] = {}
        self._rivals: dict[str, Claim] = {}
        self._streamed_by: dict[str, bytes] = {}
        self._tickets = 0

    def of(self, connection: Connection) -> Claim | None:
        """The claim, owner's or rival's, whose current connection this is."""
        for table in (self._owners, self._rivals):
            claim = None if connection.run is None else table.get(connection.run)
            if claim is not None and claim.peer == connection.peer:
                return claim
        return None

    def owner(self, run: str | None) -> Claim | None:
        return None if run is None else self._owners.get(run)

    def by_ticket(self, run: str, ticket: int) -> Claim | None:
        """The run's owner, if it still holds this ticket."""
        claim = self._owners.get(run)
        return claim if claim is not None and claim.ticket == ticket else None

    def ask(self, connection: Connection, join: m.Join, now: float) -> None:
        """A greeted connection asks for a run: it gets it, waits for the owner's answer to a probe, or is refused.

        Raises:
            RemoteProtocolError: the JOIN is impossible, or the run is another session's.
        """
        if connection.run is not None:
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"this connection has joined run {connection.run!r}")
        check_join(join)
        self._tickets += 1
        known = self.owner(join.run)
        since = known.since if known is not None and known.session == connection.session else now
        claim = Claim(self._tickets, connection.session, connection.peer, join, since)
        owner = self._owner_to_probe(claim)
        connection.run = join.run
        if owner is None:
            self._take_over(claim, now)
            return
        before = self._rivals.get(join.run)
        if before is not None:
            self._connections.dismiss(before.peer)
        claim.state = ClaimState.PROBING
        # A rival that reconnects waits no longer than before.
        claim.probe_until = now + PROBE_S if before is None else before.probe_until
        self._rivals[join.run] = claim
        self._connections.send(owner.peer, m.Heartbeat(reply=True))

    def alive(self, connection: Connection, now: float) -> None:
        """The answer to a probe arrived: if it is the owner's, a waiting rival is refused."""
        owner = self.owner(connection.run)
        if owner is not None and owner.peer == connection.peer:
            self._refuse_rival(owner, now)

    def tick(self, now: float) -> None:
        """Let time pass: an owner that did not answer a probe in time loses the run."""
        for rival in [rival for rival in self._rivals.values() if now >= rival.probe_until]:
            self._take_over(rival, now)

    def stream(self, claim: Claim, intake: Intake) -> None:
        """The session streams from now on; an older one that reconnects is evicted."""
        claim.state = ClaimState.STREAMING
        claim.intake = intake
        self._streamed_by.pop(claim.run, None)
        self._streamed_by[claim.run] = claim.session
        if len(self._streamed_by) > RUNS_REMEMBERED_MAX:
            del self._streamed_by[next(iter(self._streamed_by))]

    def refuse(self, claim: Claim, code: RejectCode, text: str) -> None:
        """The averager cannot give the run. If another session streamed it before, that one has ended with this."""
        self.end(claim, code, text)
        if claim.replaced is not None:
            self._report_end(claim, lost=True)

    def leave(self, claim: Claim, *, lost: bool) -> None:
        """The session said goodbye, or (`lost`) fell silent."""
        is_owner = self._owners.get(claim.run) is claim
        self.drop(claim)
        if is_owner:
            self._report_end(claim, lost=lost)

    def fail(self, claim: Claim, code: RejectCode, text: str) -> None:
        """The session that streams the run cannot go on with it."""
        self.end(claim, code, text)
        self._report_end(claim, lost=False)

    def end(self, claim: Claim, code: RejectCode, text: str) -> None:
        self._connections.send(claim.peer, m.Reject(code, text))
        self.drop(claim)

    def drop(self, claim: Claim) -> None:
        """Forget the claim, the owner's or the rival's."""
        self._remove(claim)
        self._connections.leave(claim.peer)

    def _owner_to_probe(self, claim: Claim) -> Claim | None:
        """The owner that has to be probed before the claim may have the run; None when it may have it at once.

        Raises:
            RemoteProtocolError: `evicted` or `run_in_use`; it may not.
        """
        join, owner, rival = claim.join, self._owners.get(claim.run), self._rivals.get(claim.run)
        if join.reconnect and self._streamed_by.get(claim.run, claim.session) != claim.session:
            raise RemoteProtocolError(RejectCode.EVICTED, f"another trainer has streamed run {claim.run!r} since")
        if owner is None or owner.session == claim.session or join.incarnation > owner.join.incarnation:
            return None
        if join.incarnation < owner.join.incarnation:
            newer = owner.join.incarnation
            text = f"run {claim.run!r} has a trainer of incarnation {newer}, this one is {join.incarnation}"
            raise RemoteProtocolError(RejectCode.EVICTED, text)
        if rival is not None and rival.session != claim.session:
            text = f"another trainer is asking for run {claim.run!r} at this moment: try again, or choose another name"
            raise RemoteProtocolError(RejectCode.RUN_IN_USE, text)
        return owner

    def _take_over(self, claim: Claim, now: float) -> None:
        owner = self._owners.get(claim.run)
        if owner is not None:
            claim.replaced = owner.ticket if owner.intake is not None else owner.replaced
        self._remove(claim)
        claim.state = ClaimState.JOINING
        self._owners[claim.run] = claim
        if owner is not None and owner.session != claim.session:
            self.end(owner, RejectCode.EVICTED, f"another trainer took run {owner.run!r} over")
        elif owner is not None:
            self._connections.dismiss(owner.peer)
        self._refuse_rival(claim, now)
        self._events.append(e.JoinRequested(claim.run, claim.ticket, claim.join))

    def _refuse_rival(self, owner: Claim, now: float) -> None:
        """The run's owner has proved that it is alive: another session need not wait for it."""
        rival = self._rivals.get(owner.run)
        if rival is not None:
            text = (
                f"run {owner.run!r} has a live trainer{_where(owner, now)}: stop that one, or choose another run name"
            )
            self.end(rival, RejectCode.RUN_IN_USE, text)

    def _report_end(self, claim: Claim, *, lost: bool) -> None:
        streamed = claim.ticket if claim.intake is not None or claim.replaced is None else claim.replaced
        self._events.append(e.SessionEnded(claim.run, streamed, lost))

    def _remove(self, claim: Claim) -> None:
        for table in (self._owners, self._rivals):
            if table.get(claim.run) is claim:
                del table[claim.run]


def check_join(join: m.Join) -> None:
    """Refuse a JOIN that no server could accept.

    Raises:
        RemoteProtocolError: `world_unsupported`, `bad_run` or `bad_average`.
    """
    if join.world != 1 or join.rank != 0:
        text = f"rank {join.rank} of {join.world}: sharded models are not served; stream the whole one from rank 0"
        raise RemoteProtocolError(RejectCode.WORLD_UNSUPPORTED, text)
    try:
        check_name("run", join.run)
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_RUN, str(error)) from None
    try:
        averages = parse_averages(join.averages)
        check_step_units(averages, join.step_units)
        check_matches(averages, [tensor.name for tensor in join.manifest.tensors])
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None


def _where(owner: Claim, now: float) -> str:
    """Process, host and age of a trainer; empty if its JOIN does not say where it runs."""
    if owner.join.host is None or owner.join.pid is None:
        return ""
    age_s = max(0.0, now - owner.since)
    age = f"{age_s / 3600:.1f} h" if age_s >= 3600 else f"{age_s:.0f} s"
    return f" (process {owner.join.pid} on host {shown(owner.join.host)}, joined {age} ago)"
