"""Which session owns which run, and who waits for it. One owner and at most one rival for each run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ema_proto.averages.rules import check_matches
from ema_proto.averages.specs import parse_averages
from ema_proto.averages.step_units import check_step_units
from ema_proto.errors import LocalProtocolError, RejectCode, RemoteProtocolError
from ema_proto.limits import PROBE_S, RUNS_REMEMBERED_MAX
from ema_proto.names import check_name
from ema_proto.receiver.intake import Intake
from ema_proto.wire import messages as m


class ClaimState(Enum):
    """Where a session's claim to its run stands."""

    PROBING = "probing"
    JOINING = "joining"
    STREAMING = "streaming"
    FINISHING = "finishing"


@dataclass(slots=True, eq=False)
class Claim:
    """A session and the run that it owns or asks for; `intake` once it streams.

    `replaced` is the ticket of the session that streamed before this one took the run over. Its end is told to the
    keeper only if this claim never streams itself.
    """

    ticket: int
    session: bytes
    peer: bytes
    join: m.Join
    state: ClaimState = ClaimState.JOINING
    probe_until: float = 0.0
    replaced: int | None = None
    intake: Intake | None = None

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.join.run


class Claims:
    """All claims of a server."""

    def __init__(self) -> None:
        self._owners: dict[str, Claim] = {}
        self._rivals: dict[str, Claim] = {}
        self._streamed_by: dict[str, bytes] = {}
        self._tickets = 0

    def new(self, session: bytes, peer: bytes, join: m.Join) -> Claim:
        """A claim that neither owns nor waits yet."""
        self._tickets += 1
        return Claim(self._tickets, session, peer, join)

    def owner(self, run: str | None) -> Claim | None:
        """The session that owns the run."""
        return None if run is None else self._owners.get(run)

    def rival(self, run: str | None) -> Claim | None:
        """The session that waits for the owner's answer to a probe."""
        return None if run is None else self._rivals.get(run)

    def by_ticket(self, run: str, ticket: int) -> Claim | None:
        """The owner of the run if it still holds this ticket."""
        claim = self._owners.get(run)
        return claim if claim is not None and claim.ticket == ticket else None

    def of_peer(self, run: str | None, peer: bytes) -> Claim | None:
        """The claim, owner's or rival's, that `peer` is the current connection of."""
        for claim in (self.owner(run), self.rival(run)):
            if claim is not None and claim.peer == peer:
                return claim
        return None

    def judge(self, claim: Claim) -> Claim | None:
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

    def install(self, claim: Claim) -> None:
        """Make the claim the run's owner."""
        before = self._owners.get(claim.run)
        if before is not None:
            claim.replaced = before.ticket if before.intake is not None else before.replaced
        self.remove(claim)
        claim.state = ClaimState.JOINING
        self._owners[claim.run] = claim

    def wait(self, claim: Claim, now: float) -> None:
        """Let the claim wait for the owner's answer; a rival that reconnects waits no longer than before."""
        before = self._rivals.get(claim.run)
        claim.state = ClaimState.PROBING
        claim.probe_until = now + PROBE_S if before is None else before.probe_until
        self._rivals[claim.run] = claim

    def stream(self, claim: Claim, intake: Intake) -> None:
        """The claim's session streams from now on; an older one that reconnects will be told that it was evicted."""
        claim.state = ClaimState.STREAMING
        claim.intake = intake
        self._streamed_by.pop(claim.run, None)
        self._streamed_by[claim.run] = claim.session
        if len(self._streamed_by) > RUNS_REMEMBERED_MAX:
            del self._streamed_by[next(iter(self._streamed_by))]

    def remove(self, claim: Claim) -> None:
        """Forget the claim, whichever it is."""
        for table in (self._owners, self._rivals):
            if table.get(claim.run) is claim:
                del table[claim.run]

    def unanswered(self, now: float) -> list[Claim]:
        """Rivals whose probe ran out of time."""
        return [claim for claim in self._rivals.values() if now >= claim.probe_until]


def check_join(join: m.Join) -> None:
    """Refuse what no run can be, whoever asks.

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
