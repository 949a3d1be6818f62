"""Which gang owns which run. A JOIN gets the run, waits while its owner is probed or for other ranks, or is refused."""

from __future__ import annotations

from collections import deque

from ema_proto.averages.rules import check_matches
from ema_proto.averages.specs import parse_averages
from ema_proto.averages.step_units import check_step_units
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import FINISHED_KEPT_S, PROBE_S, RANKS_MAX, RANKS_WAIT_S, RUNS_REMEMBERED_MAX
from ema_proto.names import check_name
from ema_proto.receiver import events as e
from ema_proto.receiver.connections import Connection, Connections
from ema_proto.receiver.gang import Claim, ClaimState, Gang, Key, key_of
from ema_proto.wire import messages as m
from ema_proto.wire.body import shown

_MERGED_AT_ONCE = 1 << 14  # boxes of the manifests of several ranks: about 50 ms, in which nothing else is received


class Ownership:
    """The gangs of all runs: one owner and at most one rival, which waits for the owner's answers to a probe, each.

    Args:
        connections: where refusals and probes go.
        events: where requests for the averager are appended.
    """

    def __init__(self, connections: Connections, events: deque[e.ReceiverEvent]) -> None:
        self._connections = connections
        self._events = events
        self._owners: dict[str, Gang] = {}
        self._rivals: dict[str, Gang] = {}
        self._finished: dict[tuple[str, Key], tuple[float, Gang]] = {}  # with the time until which each is kept
        self._by_peer: dict[bytes, tuple[Gang, Claim]] = {}
        self._streamed_by: dict[str, Key] = {}
        self._tickets = 0

    def of(self, connection: Connection) -> tuple[Gang, Claim] | None:
        """The claim whose current connection this is, and its gang, the owner or the rival of a run."""
        return self._by_peer.get(connection.peer)

    def owner(self, run: str) -> Gang | None:
        return self._owners.get(run)

    def by_ticket(self, run: str, ticket: int) -> Gang | None:
        """The run's owner, if it still holds this ticket."""
        gang = self._owners.get(run)
        return gang if gang is not None and gang.ticket == ticket else None

    def ask(self, connection: Connection, join: m.Join, now: float) -> Gang | None:
        """A greeted connection asks for a run: it gets it, waits, or is refused.

        Returns:
            The gang, if the session has returned to one that streams or has finished: `Receiver` answers it.

        Raises:
            RemoteProtocolError: the connection has joined a run, or the run is another gang's.
        """
        if connection.run is not None:
            raise RemoteProtocolError(RejectCode.BAD_MESSAGE, f"this connection has joined run {connection.run!r}")
        claim, key = Claim(connection.session, connection.peer, join), key_of(join, connection.session)
        returned_to = self._gang_of(claim, key)
        if returned_to is not None:
            return self._return(connection, claim, returned_to, now)
        known = self.owner(join.run)
        since = known.since if known is not None and known.key == key and join.world == 1 else now
        self._tickets += 1
        gang = Gang(self._tickets, join.run, key, since, wait_until=now + RANKS_WAIT_S)
        owner = self._owner_to_probe(gang, claim)
        connection.run = join.run
        if owner is None:
            self._add(gang, claim)
            self._take_over(gang, now)
            return None
        before = self._rivals.get(join.run)
        if before is not None:
            self._dismiss(before)
        # A rival that reconnects waits no longer than before.
        gang.probe_until = now + PROBE_S if before is None else before.probe_until
        self._rivals[join.run] = gang
        self._add(gang, claim)
        gang.unanswered = {member.peer for member in owner.members.values()}
        for member in owner.members.values():
            self._connections.send(member.peer, m.Heartbeat(reply=True))
        return None

    def alive(self, connection: Connection, now: float) -> None:
        """The answer to a probe arrived: when all ranks of the owner have answered, a waiting rival is refused."""
        found = self.of(connection)
        if found is None or self._owners.get(found[0].run) is not found[0]:
            return
        self._answered(found[0], connection.peer, now)

    def tick(self, now: float) -> None:
        """Let time pass: an owner that did not answer a probe in time loses the run, and ranks wait no longer."""
        for rival in [rival for rival in self._rivals.values() if now >= rival.probe_until]:
            self._take_over(rival, now)
        for gang in [gang for gang in self._owners.values() if gang.assembly is None and now >= gang.wait_until]:
            if not gang.is_complete:
                self._refuse_incomplete(gang)
        for gang in [gang for gang in self._owners.values() if gang.merging is not None]:
            self._merge(gang)
        for key, (until, gang) in list(self._finished.items()):
            if now >= until and not gang.members:
                del self._finished[key]

    @property
    def is_merging(self) -> bool:
        """Whether `tick` has manifests to merge."""
        return any(gang.merging is not None for gang in self._owners.values())

    def of_several_ranks(self) -> list[Gang]:
        """The owners that have more than one rank."""
        return [gang for gang in self._owners.values() if gang.world > 1]

    def rewinds_due(self, now: float) -> list[Gang]:
        """The gangs of which some ranks have waited too long for the others to go back too."""
        return [gang for gang in self._owners.values() if now >= gang.rewind_until]

    def stream(self, gang: Gang) -> None:
        """The gang streams from now on; an older one that reconnects is evicted."""
        for claim in gang.members.values():
            claim.state = ClaimState.STREAMING
        self._streamed_by.pop(gang.run, None)
        self._streamed_by[gang.run] = gang.key
        if len(self._streamed_by) > RUNS_REMEMBERED_MAX:
            del self._streamed_by[next(iter(self._streamed_by))]

    def refuse(self, gang: Gang, code: RejectCode, text: str) -> None:
        """The run cannot be given. If another gang streamed it before, that one has ended with this."""
        self.end(gang, code, text)
        if gang.replaced is not None:
            self._report_end(gang, lost=True)

    def leave(self, gang: Gang, claim: Claim, *, lost: bool) -> None:
        """The session said goodbye, or (`lost`) fell silent. A gang ends with its last session."""
        is_owner = self._owners.get(gang.run) is gang
        self._forget(gang, claim)
        if gang.members:
            return
        self._remove(gang)
        if is_owner:
            self._report_end(gang, lost=lost)

    def fail(self, gang: Gang, code: RejectCode, text: str) -> None:
        """The trainer that streams the run cannot go on with it."""
        self.end(gang, code, text)
        self._report_end(gang, lost=False)

    def end(self, gang: Gang, code: RejectCode, text: str) -> None:
        for claim in list(gang.members.values()):
            self._connections.send(claim.peer, m.Reject(code, text))
        self.drop(gang)

    def drop(self, gang: Gang) -> None:
        """Forget the gang, the owner or the rival."""
        self._remove(gang)
        for claim in list(gang.members.values()):
            self._forget(gang, claim)

    def release(self, gang: Gang, now: float) -> None:
        """The run is finished: another gang may have it. Ranks of this one that are away return to it for a minute."""
        self._remove(gang)
        if gang.world > 1:
            self._finished[gang.run, gang.key] = now + FINISHED_KEPT_S, gang

    def drop_member(self, gang: Gang, claim: Claim) -> None:
        """Forget a session that is done, and the gang with the last one."""
        self._forget(gang, claim)
        if not gang.members:
            self._remove(gang)

    def _gang_of(self, claim: Claim, key: Key) -> Gang | None:
        """The gang of several ranks that this session belongs to, one that has finished first."""
        run = claim.join.run
        _, finished = self._finished.get((run, key), (0.0, None))
        known = (finished, self._owners.get(run), self._rivals.get(run))
        mine = (gang for gang in known if gang is not None and gang.admits(key, claim.rank, claim.session))
        return next(mine, None) if claim.join.world > 1 else None

    def _return(self, connection: Connection, claim: Claim, gang: Gang, now: float) -> Gang | None:
        """A rank joins a gang that others have formed, or returns to it; the gang, if it streams already."""
        connection.run = gang.run
        former = gang.members.get(claim.rank)
        self._add(gang, claim)
        if former is not None and self._owners.get(gang.run) is gang:
            self._answered(gang, former.peer, now)
        if gang.assembly is None and self._owners.get(gang.run) is gang:
            self._request(gang)
        return None if gang.assembly is None else gang

    def _answered(self, owner: Gang, peer: bytes, now: float) -> None:
        """A rank of the owner has proved that it is alive, on the connection that was probed or by a new one."""
        rival = self._rivals.get(owner.run)
        if rival is not None:
            rival.unanswered.discard(peer)
            if not rival.unanswered and owner.is_complete:
                self._refuse_rival(owner, now)

    def _add(self, gang: Gang, claim: Claim) -> None:
        before = gang.members.get(claim.rank)
        if before is not None:
            gang.forget_rewinds(claim.rank)
            self._by_peer.pop(before.peer, None)
            self._connections.dismiss(before.peer)
        gang.members[claim.rank] = claim
        gang.sessions[claim.rank] = claim.session
        claim.state = ClaimState.PROBING if self._rivals.get(gang.run) is gang else ClaimState.JOINING
        self._by_peer[claim.peer] = gang, claim

    def _request(self, gang: Gang) -> None:
        """Ask the averager for the run, once all ranks have joined and their manifests are merged."""
        gang.merging = None  # the JOIN of a rank may have come again
        self._merge(gang)

    def _merge(self, gang: Gang) -> None:
        if not gang.is_complete:
            gang.merging = None
            return
        try:
            join = gang.merge(_MERGED_AT_ONCE)
        except RemoteProtocolError as error:
            self.refuse(gang, error.code, error.text)
            return
        if join is not None:
            sessions = tuple(gang.members[rank].session for rank in range(gang.world))
            self._events.append(e.JoinRequested(gang.run, gang.ticket, join, gang.parts, sessions))

    def _owner_to_probe(self, gang: Gang, claim: Claim) -> Gang | None:
        """The owner that has to be probed before the gang may have the run; None when it may have it at once.

        Raises:
            RemoteProtocolError: `evicted` or `run_in_use`; it may not.
        """
        run, owner, rival = gang.run, self._owners.get(gang.run), self._rivals.get(gang.run)
        if claim.join.reconnect and self._streamed_by.get(run, gang.key) != gang.key:
            raise RemoteProtocolError(RejectCode.EVICTED, f"another trainer has streamed run {run!r} since")
        if owner is None or (gang.world == 1 and owner.key == gang.key) or gang.incarnation > owner.incarnation:
            return None
        if gang.incarnation < owner.incarnation:
            text = f"run {run!r} has a trainer of incarnation {owner.incarnation}, this one is {gang.incarnation}"
            raise RemoteProtocolError(RejectCode.EVICTED, text)
        if rival is not None and not (gang.world == 1 and rival.key == gang.key):
            text = f"another trainer is asking for run {run!r} at this moment: try again, or choose another name"
            raise RemoteProtocolError(RejectCode.RUN_IN_USE, text)
        return owner

    def _take_over(self, gang: Gang, now: float) -> None:
        owner = self._owners.get(gang.run)
        if owner is not None:
            gang.replaced = owner.ticket if owner.assembly is not None else owner.replaced
        self._remove(gang)
        for claim in gang.members.values():
            claim.state = ClaimState.JOINING
        self._owners[gang.run] = gang
        if owner is not None and (owner.key != gang.key or gang.world > 1):
            self.end(owner, RejectCode.EVICTED, f"another trainer took run {owner.run!r} over")
        elif owner is not None:
            self._dismiss(owner)
        self._refuse_rival(gang, now)
        self._request(gang)

    def _refuse_rival(self, owner: Gang, now: float) -> None:
        """The run's owner has proved that it is alive: another gang need not wait for it."""
        rival = self._rivals.get(owner.run)
        if rival is not None:
            text = (
                f"run {owner.run!r} has a live trainer{_where(owner, now)}: stop that one, or choose another run name"
            )
            self.end(rival, RejectCode.RUN_IN_USE, text)

    def _refuse_incomplete(self, gang: Gang) -> None:
        missing = [rank for rank in range(gang.world) if rank not in gang.members]
        ranks = ", ".join(map(str, missing[:8])) + (" and others" if len(missing) > 8 else "")
        returned = any(claim.join.reconnect for claim in gang.members.values())
        cause = "they may have ended: see their logs" if returned else "call attach() on every rank"
        text = (
            f"{len(gang.members)} of {gang.world} ranks have joined run {gang.run!r} within {RANKS_WAIT_S:g} s, "
            f"without {ranks}: {cause}"
        )
        self.refuse(gang, RejectCode.RANKS_MISSING, text)

    def _report_end(self, gang: Gang, *, lost: bool) -> None:
        streamed = gang.ticket if gang.assembly is not None or gang.replaced is None else gang.replaced
        self._events.append(e.SessionEnded(gang.run, streamed, lost))

    def _forget(self, gang: Gang, claim: Claim) -> None:
        if gang.members.get(claim.rank) is claim:
            del gang.members[claim.rank]
            gang.forget_rewinds(claim.rank)
        self._by_peer.pop(claim.peer, None)
        self._connections.leave(claim.peer)

    def _dismiss(self, gang: Gang) -> None:
        """The sessions of this gang have moved to other connections."""
        for claim in gang.members.values():
            self._by_peer.pop(claim.peer, None)
            self._connections.dismiss(claim.peer)

    def _remove(self, gang: Gang) -> None:
        for table in (self._owners, self._rivals):
            if table.get(gang.run) is gang:
                del table[gang.run]


def check_join(join: m.Join) -> None:
    """Refuse a JOIN that no server could accept.

    Raises:
        RemoteProtocolError: `world_unsupported`, `manifest_invalid`, `bad_run` or `bad_average`.
    """
    if join.rank >= join.world or join.world > RANKS_MAX:
        text = f"rank {join.rank} of {join.world}: ranks count from 0, and a trainer has {RANKS_MAX} at most"
        raise RemoteProtocolError(RejectCode.WORLD_UNSUPPORTED, text)
    if join.world > 1 and join.gang is None:
        text = f"rank {join.rank} of {join.world}: sharded models are not served; stream the whole one from rank 0"
        raise RemoteProtocolError(RejectCode.WORLD_UNSUPPORTED, text)
    if join.world == 1 and any(tensor.box is not None for tensor in join.manifest.tensors):
        raise RemoteProtocolError(RejectCode.MANIFEST_INVALID, "a trainer of one rank holds whole tensors, not boxes")
    try:
        check_name("run", join.run)
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_RUN, str(error)) from None
    try:
        averages = parse_averages(join.averages)
        check_step_units(averages, join.step_units)
        if join.world == 1:  # the patterns of several ranks are compared with all their tensors, see `Gang`
            check_matches(averages, [tensor.name for tensor in join.manifest.tensors])
    except LocalProtocolError as error:
        raise RemoteProtocolError(RejectCode.BAD_AVERAGE, str(error)) from None


def _where(owner: Gang, now: float) -> str:
    """Process, host and age of a trainer's lowest rank; empty if its JOIN does not say where it runs."""
    join = owner.members[min(owner.members)].join
    if join.host is None or join.pid is None:
        return ""
    age_s = max(0.0, now - owner.since)
    age = f"{age_s / 3600:.1f} h" if age_s >= 3600 else f"{age_s:.0f} s"
    return f" (process {join.pid} on host {shown(join.host)}, joined {age} ago)"
